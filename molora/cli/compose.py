"""``molora compose``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.attach import Mixture
    from molora.compose import FrozenExperts

SECTIONS = ("router", "mixture", "new", "model", "seed")
"""First keys of KEY=VALUE."""
OWN = ("method", "groups")
"""Fields of a mixture that follow from its experts and router."""


def compose(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the mixture goes.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings of the router, the mixture or a new expert, such as router.top_k=2, "
            "mixture.dtype=bfloat16 or new.law.rank=16.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model, a directory or a hub name; with --from not needed if its base is "
            "a directory here."
        ),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            "--add",
            metavar="NAME=DIR",
            help="A LoRA that package peft saved; may be given repeatedly.",
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What decides; `molora methods` lists them. [arrow, or with --from the one there]",
        ),
    ] = None,
    missing: Annotated[
        str | None,
        typer.Option(
            metavar="mask|renorm|zero|error",
            help="What an expert's part becomes at a linear that it does not adapt.",
        ),
    ] = None,
    new: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further expert, to be trained.")
    ] = None,
    trainable: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An expert that is trained on.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="DIR", help="A saved mixture, whose experts and router are kept."
        ),
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --from: an expert that goes.")
    ] = None,
) -> None:
    """Make a mixture of LoRAs that others trained.

    The experts may differ in rank, scaling, dtype and linears. Their directories and the base are
    only read. With --from the experts of a saved mixture come out of it as they are, frozen unless
    --trainable names them, and learned routers keep what they know of experts that stay.

    \b
    Example:
      molora compose --base MODEL --expert math=DIR --expert code=DIR --router arrow --out DIR
      molora compose --base MODEL --expert math=DIR --expert code=DIR --out DIR router.top_k=2
      molora compose --from DIR --add law=DIR2 --drop math --out DIR3
    """
    from molora import io
    from molora.cli.experts import read_table
    from molora.compose import load_experts

    settings = _settings(base, source, router, new or (), overrides or ())
    directories = _directories(expert or ())
    if drop and source is None:
        raise ConfigError("--drop takes experts out of a saved mixture. Name it with --from.")
    io.check_writable(out)
    experts = load_experts(directories) if directories or source is None else None
    for line in read_table(experts) if experts is not None else ():
        typer.echo(line)
    chosen = {"missing": missing, "trainable": trainable or ()}
    with _notes_printed():
        if source is None:
            assert experts is not None
            mixture = _composed(settings, experts, chosen)
        else:
            mixture = _edited(source, settings, experts, {**chosen, "drop": drop or ()})
    mixture.save(out)
    typer.echo(f"The mixture is in {out}")


def _settings(
    base: str | None,
    source: Path | None,
    router: str | None,
    new: Sequence[str],
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Sections of settings: what options say, and what KEY=VALUE replaces of it."""
    from molora.cli.settings import check_values
    from molora.compose.compose import NEW
    from molora.config.base import unknown_name
    from molora.presets.overrides import replaced

    if source is not None:
        from molora.generate.load import base_name

        base = base_name(source, base)
    if base is None:
        raise ConfigError("--base is missing: the model that the experts were trained on.")
    kept = router is None and source is not None
    settings: dict[str, Any] = {
        "model": {"name": base, "dtype": "auto"},
        "router": {} if kept else {"kind": router or "arrow"},
        "new": {name: {} for name in new},
        "mixture": {},
        "seed": 0,
    }
    settings = replaced(settings, overrides)
    for section, value in settings.items():
        if section not in SECTIONS:
            raise ConfigError(unknown_name("section", section, list(SECTIONS)))
        if section != "seed":
            check_values(section, value, {})
    from molora.config import MixtureConfig

    known = [name for name in ("dropout", *MixtureConfig.model_fields) if name not in OWN]
    for name in settings["mixture"]:
        if name not in known:
            raise ConfigError(f"mixture: {unknown_name('key', str(name), known)}")
    if not isinstance(settings["seed"], int) or settings["seed"] < 0:
        raise ConfigError(f"seed={settings['seed']!r}: it is an integer from 0 on.")
    for name, values in settings["new"].items():
        check_values(f"new.{name}", values, dict.fromkeys(NEW, float))
    check_values("router", settings["router"], _types_of(settings["router"].get("kind")))
    return settings


def _types_of(router: Any) -> dict[str, Any]:
    """Argument → type of a router's recipe; none of one that is not known."""
    from typing import get_type_hints

    from molora.presets.frozen import ROUTERS

    return get_type_hints(ROUTERS[router]) if isinstance(router, str) and router in ROUTERS else {}


def _directories(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, directory = pair.partition("=")
        if not (name and equals and directory):
            raise ConfigError(f"--expert {pair!r} is not of the form NAME=DIR.")
        if name in found:
            raise ConfigError(f"--expert {name} is given twice. Give each a name of its own.")
        found[name] = directory
    return found


def _composed(
    settings: Mapping[str, Any], experts: FrozenExperts, chosen: Mapping[str, Any]
) -> Mixture:
    from molora.compose import compose as put_together

    model = _model(settings)
    return put_together(model, experts, router=settings["router"], **_keywords(settings), **chosen)


def _edited(
    source: Path,
    settings: Mapping[str, Any],
    add: FrozenExperts | None,
    chosen: Mapping[str, Any],
) -> Mixture:
    from molora.attach import load
    from molora.compose.edit import edited

    mixture = load(_model(settings), source)
    return edited(mixture, add=add, router=settings["router"], **_keywords(settings), **chosen)


def _keywords(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"new": settings["new"], "seed": settings["seed"], **settings["mixture"]}


def _model(settings: Mapping[str, Any]) -> Any:
    from molora.config.run import ModelConfig
    from molora.train.loading import load_model

    return load_model(ModelConfig.parse(settings["model"]))


@contextmanager
def _notes_printed() -> Iterator[None]:
    """Print what is warned of inside, each once."""
    from molora.cli.experts import harmless

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        typer.echo(f"note     {harmless(text)}")

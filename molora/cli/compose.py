"""``molora compose``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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
        str | None, typer.Option(help="The base model, a directory or a hub name.")
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="A LoRA that package peft saved; may be given repeatedly."
        ),
    ] = None,
    router: Annotated[
        str, typer.Option(metavar="NAME", help="What decides; `molora methods` lists them.")
    ] = "arrow",
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
) -> None:
    """Make a mixture of LoRAs that others trained.

    The experts may differ in rank, scaling, dtype and linears. Their directories and the base are
    only read.

    \b
    Example:
      molora compose --base MODEL --expert math=DIR --expert code=DIR --router arrow --out DIR
      molora compose --base MODEL --expert math=DIR --expert code=DIR --out DIR router.top_k=2
    """
    from molora import io
    from molora.cli.experts import read_table
    from molora.compose import load_experts

    settings = _settings(base, router, new or (), overrides or ())
    directories = _directories(expert or ())
    io.check_writable(out)
    experts = load_experts(directories)
    for line in read_table(experts):
        typer.echo(line)
    chosen = {"missing": missing, "trainable": trainable or ()}
    mixture = _composed(settings, experts, chosen)
    mixture.save(out)
    typer.echo(f"The mixture is in {out}")


def _settings(
    base: str | None, router: str, new: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any]:
    """Sections of settings: what options say, and what KEY=VALUE replaces of it."""
    from molora.compose.compose import NEW
    from molora.config.base import unknown_name
    from molora.presets.overrides import replaced

    if base is None:
        raise ConfigError("--base is missing: the model that the experts were trained on.")
    settings: dict[str, Any] = {
        "model": {"name": base, "dtype": "auto"},
        "router": {"kind": router},
        "new": {name: {} for name in new},
        "mixture": {},
        "seed": 0,
    }
    settings = replaced(settings, overrides)
    for section, value in settings.items():
        if section not in SECTIONS:
            raise ConfigError(unknown_name("section", section, list(SECTIONS)))
        if section != "seed":
            _check_values(section, value, {})
    from molora.config import MixtureConfig

    known = [name for name in ("dropout", *MixtureConfig.model_fields) if name not in OWN]
    for name in settings["mixture"]:
        if name not in known:
            raise ConfigError(f"mixture: {unknown_name('key', str(name), known)}")
    if not isinstance(settings["seed"], int) or settings["seed"] < 0:
        raise ConfigError(f"seed={settings['seed']!r}: it is an integer from 0 on.")
    for name, values in settings["new"].items():
        _check_values(f"new.{name}", values, dict.fromkeys(NEW, float))
    _check_values("router", settings["router"], _types_of(settings["router"].get("kind")))
    return settings


def _types_of(router: Any) -> dict[str, Any]:
    """Argument → type of a router's recipe; none of one that is not known."""
    from typing import get_type_hints

    from molora.presets.frozen import ROUTERS

    return get_type_hints(ROUTERS[router]) if isinstance(router, str) and router in ROUTERS else {}


def _check_values(section: str, values: Any, types: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that is not of its type; names are checked elsewhere."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(values, Mapping):
        raise ConfigError(f"{section}={values!r}: give its settings, as {section}.KEY=VALUE.")
    for name, value in values.items():
        try:
            TypeAdapter(types.get(name, Any)).validate_python(value)
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(f"{section}.{name}={value!r}: {reason}.") from None


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
    """The mixture on its base; notes are printed."""
    from molora.cli.experts import harmless
    from molora.compose import compose as put_together
    from molora.config.run import ModelConfig
    from molora.train.loading import load_model

    model = load_model(ModelConfig.parse(settings["model"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mixture = put_together(
            model,
            experts,
            router=settings["router"],
            new=settings["new"],
            seed=settings["seed"],
            **chosen,
            **settings["mixture"],
        )
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        typer.echo(f"note     {harmless(text)}")
    return mixture

"""What ``molora compose`` does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molora.cli.settings import check_values
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.attach import Mixture
    from molora.compose import FrozenExperts

SECTIONS = ("router", "mixture", "new", "model", "seed", "data", "train")
"""First keys of KEY=VALUE."""
OF_TRAINING = ("data", "train")
OWN = ("method", "groups")
"""Fields of a mixture that follow from its experts and router."""
START = "composed"
"""Directory of a run that has the mixture before it is trained."""


class Base:
    """The base model, loaded once it is needed.

    Args:
        settings: of `ModelConfig`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from molora.config.run import ModelConfig

        self.config = ModelConfig.parse(settings)
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The model in evaluation mode."""
        if self._model is None:
            from molora.train.loading import load_model

            self._model = load_model(self.config)
        return self._model

    def weight(self, path: str) -> Any:
        """(out, in) of one of its linears."""
        from molora.attach.row_scale import base_weight
        from molora.attach.targets import match_paths

        match_paths(self.model, [path])
        return base_weight(self.model.get_submodule(path))


def settings_of(
    base: str | None,
    source: Path | None,
    router: str | None,
    new: Sequence[str],
    overrides: Sequence[str],
    *,
    train: Sequence[str],
) -> dict[str, Any]:
    """Sections of settings: what options say, and what KEY=VALUE replaces of it.

    Raises:
        ConfigError: sections, keys and values that cannot be, as far as is known now.
        CheckpointError: a saved mixture that is damaged, or whose base has to be named.
    """
    from molora.presets.overrides import replaced

    if source is not None:
        from molora.cli.inspect import check_no_run
        from molora.generate.load import base_name

        check_no_run(source)
        base = base_name(source, base)
    if base is None:
        raise ConfigError("--base is missing: the model that the experts were trained on.")
    elsewhere = source is not None if router is None else is_stored(router)
    settings: dict[str, Any] = {
        "model": {"name": base, "dtype": "auto"},
        "router": {} if elsewhere else {"kind": router or "arrow"},
        "new": {name: {} for name in new},
        "mixture": {},
        "seed": 0,
    }
    if train:
        settings |= {"data": {"train": list(train)}, "train": {}}
    settings = replaced(settings, overrides)
    _check(settings, trains=bool(train))
    return settings


def _check(settings: Mapping[str, Any], *, trains: bool) -> None:
    from molora.compose.compose import NEW
    from molora.config import MixtureConfig
    from molora.config.base import unknown_name
    from molora.config.data import DataConfig
    from molora.config.run import TrainConfig

    for section, value in settings.items():
        if section not in SECTIONS:
            raise ConfigError(unknown_name("section", section, list(SECTIONS)))
        if section in OF_TRAINING and not trains:
            raise ConfigError(
                f"{section}.…: nothing is trained. Name rows with --train, or drop it."
            )
        if section != "seed":
            check_values(section, value, {})
    known = [name for name in ("dropout", *MixtureConfig.model_fields) if name not in OWN]
    for name in settings["mixture"]:
        if name not in known:
            raise ConfigError(f"mixture: {unknown_name('key', str(name), known)}")
    if not isinstance(settings["seed"], int) or settings["seed"] < 0:
        raise ConfigError(f"seed={settings['seed']!r}: it is an integer from 0 on.")
    for name, values in settings["new"].items():
        check_values(f"new.{name}", values, dict.fromkeys(NEW, float))
    check_values("router", settings["router"], _types_of(settings["router"].get("kind")))
    if trains:
        DataConfig.parse(settings["data"])
        TrainConfig.parse(settings["train"])
        if "start_from" in settings["train"]:
            raise ConfigError("train.start_from: the run starts from what is composed. Drop it.")


def _types_of(router: Any) -> dict[str, Any]:
    """Argument → type of a router's recipe; none of one that is not known."""
    from typing import get_type_hints

    from molora.presets.frozen import ROUTERS

    return get_type_hints(ROUTERS[router]) if isinstance(router, str) and router in ROUTERS else {}


def is_stored(router: str) -> bool:
    """Whether it is the place of a router that another package stored."""
    from molora.presets.frozen import ROUTERS

    return router not in ROUTERS and Path(router).exists()


def is_xlora(router: str) -> bool:
    """Whether it is the place of an X-LoRA, which brings experts and a classifier along."""
    from molora.io.formats.parsing import json_object
    from molora.io.formats.xlora import AUTHORS_CONFIG
    from molora.io.peft_files import CONFIG

    if not is_stored(router):
        return False
    config = Path(router) / CONFIG
    theirs = (Path(router) / AUTHORS_CONFIG).exists()
    return theirs or (config.is_file() and json_object(config).get("peft_type") == "XLORA")


def fill_router(
    settings: dict[str, Any], router: str | None, vectors: str | None, experts: FrozenExperts | None
) -> None:
    """Put into the settings what of the router lies in files.

    Raises:
        ConfigError, CheckpointError: files of another kind, or for other experts.
    """
    from molora.compose.foreign import router_from
    from molora.compose.stored_vectors import load_vectors

    own = settings["router"]
    if (router is not None and is_stored(router)) or vectors not in (None, "arrow"):
        if experts is None:
            raise ConfigError(
                "a stored router or stored vectors are of experts that are given by --expert. With "
                "--from say its settings as router.KEY=VALUE."
            )
        if router is not None and is_stored(router):
            own = {**router_from(router, [*experts.names, *settings["new"]]), **own}
    if vectors == "arrow":
        own = {**own, "vectors": "arrow"}
    elif vectors is not None:
        assert experts is not None
        kind = "gate" if own.get("kind") == "phatgoose" else "mean"
        own = {**own, "vectors": load_vectors(vectors, experts, kind=kind)}  # type: ignore[arg-type]
    settings["router"] = own


def check_alone(source: Path | None, *others: Any) -> None:
    """Raise ConfigError for options that an X-LoRA, which is complete, does not take."""
    if source is not None or any(others):
        raise ConfigError(
            "--router names an X-LoRA, which has experts and a classifier: it takes no --from, "
            "--new, --trainable and --vectors. Compose it, and change what comes out with --from."
        )


def of_xlora(
    base: Base,
    settings: Mapping[str, Any],
    router: str,
    pairs: Sequence[str],
    missing: str | None,
) -> Mixture:
    """The mixture of an X-LoRA of package peft or of its authors.

    Args:
        base: the base.
        settings: of the mixture.
        router: its directory.
        pairs: NAME=DIR of its adapters, where they do not lie in it.
        missing: as in `compose`.
    """
    from molora.cli.experts import read_table
    from molora.compose.edit import experts_of
    from molora.compose.xlora import compose_xlora

    if settings["router"]:
        raise ConfigError(
            f"router.{next(iter(settings['router']))}: the X-LoRA in {router} says it. Compose it, "
            "and change it with --from."
        )
    options = settings["mixture"] | ({} if missing is None else {"missing": missing})
    mixture = compose_xlora(
        base.model,
        router,
        adapters=directories_of(pairs) or None,
        seed=settings["seed"],
        **options,
    )
    for line in read_table(experts_of(mixture)):
        typer.echo(line)
    return mixture


def check_place(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError if nothing could be written there, before anything is loaded."""
    from molora import io

    io.check_writable(out)
    if "train" in settings:
        io.check_writable(out / START)


def read(
    base: Base,
    pairs: Sequence[str],
    library: Path | None,
    initial: Sequence[str],
    *,
    allow_pickle: bool,
    needed: bool,
) -> FrozenExperts | None:
    """The experts of NAME=DIR or of a library, with a line for each on the terminal; None for none,
    if not `needed`."""
    from molora.cli.experts import read_table
    from molora.compose import load_experts

    directories = directories_of(pairs)
    if library is not None and directories:
        raise ConfigError("--expert and --library both name the experts. Give one of the two.")
    if library is None and not directories and not needed:
        return None
    experts = load_experts(
        directories if library is None else library,
        allow_pickle=allow_pickle,
        initial=directories_of(initial) or None,
        base_weight=base.weight,
    )
    for line in read_table(experts):
        typer.echo(line)
    return experts


def directories_of(pairs: Sequence[str]) -> dict[str, str]:
    """Name → directory of NAME=DIR."""
    directories: dict[str, str] = {}
    for pair in pairs:
        name, equals, directory = pair.partition("=")
        if not (name and equals and directory):
            raise ConfigError(f"--expert {pair!r} is not of the form NAME=DIR.")
        if name in directories:
            raise ConfigError(f"--expert {name} is given twice. Give each a name of its own.")
        directories[name] = directory
    return directories


def composed(
    base: Base,
    settings: Mapping[str, Any],
    experts: FrozenExperts | None,
    chosen: Mapping[str, Any],
) -> Mixture:
    """The mixture of experts that were read, on its base."""
    from molora.compose import compose

    assert experts is not None
    return compose(base.model, experts, router=settings["router"], **_keywords(settings), **chosen)


def edited(
    base: Base,
    source: Path,
    settings: Mapping[str, Any],
    add: FrozenExperts | None,
    chosen: Mapping[str, Any],
) -> Mixture:
    """The saved mixture on its base, with other experts."""
    from molora.attach import load
    from molora.compose.edit import edited as with_others

    mixture = load(base.model, source)
    router = settings["router"]
    return with_others(mixture, add=add, router=router, **_keywords(settings), **chosen)


def trained(mixture: Mixture, settings: Mapping[str, Any], out: Path, *, quiet: bool) -> None:
    """Train what of the mixture is not frozen; `out` is the directory of the run.

    Raises:
        ConfigError: nothing to train.
    """
    from molora.config.run import RunConfig
    from molora.train.progress import closing_words
    from molora.train.run import train

    if not any(mixture.num_parameters().values()):
        raise ConfigError(
            f"--train: router {mixture.config.method} has nothing to learn and every expert is "
            "frozen. Use a learned router, such as linear or xlora, or --new or --trainable."
        )
    mixture.save(out / START)
    mixture.detach()
    run = {key: settings[key] for key in ("model", "data", "train", "seed")}
    place = {"mixture": {"from": str(out / START)}, "output_dir": str(out)}
    config = RunConfig.parse({**run, **place})
    result = train(config, progress=not quiet)
    if not quiet:
        typer.echo(closing_words(config, result))


def _keywords(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"new": settings["new"], "seed": settings["seed"], **settings["mixture"]}


@contextmanager
def notes_printed() -> Iterator[None]:
    """Print what is warned of inside, each once."""
    from molora.cli.experts import harmless

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    notes = [str(warning.message) for warning in caught if warning.category is UserWarning]
    for text in dict.fromkeys(notes):
        typer.echo(f"note     {harmless(text)}")
    for warning in caught:
        if warning.category is not UserWarning:  # of a library, to its developers
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )

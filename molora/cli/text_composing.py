"""Routers of ``molora compose`` that are made from texts: by an encoder, or by few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molora.cli.text_routing import load_encoder
from molora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from molora.attach import Mixture
    from molora.cli.composing import Base
    from molora.compose import FrozenExperts
    from molora.compose.centroids import Centroids
    from molora.compose.text_router import TextRouter
    from molora.compose.text_settings import ByClassifier, ByRetriever, Settings
    from molora.data import Row

OF_ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
"""Suffixes of files with rows; another file has a sample on every line."""
DEFAULTS = {"weights": "top_k_mean", "select": "top_p"}
"""Kinds of settings of which others are given."""


@dataclass(frozen=True)
class Request:
    """What of the command line is about texts.

    Attributes:
        router: that `compose` takes.
        overrides: KEY=VALUE that are not about texts.
        by: settings of a router from texts, if one was asked for.
        encoder: where the encoder is.
        samples: texts of experts by their names.
        examples: rows to search by.
    """

    router: str | None
    overrides: list[str]
    by: Settings | None = None
    encoder: str | None = None
    samples: Mapping[str, list[str]] | None = None
    examples: Sequence[Row] = ()


def requested(
    router: str | None,
    encoder: str | None,
    samples: Sequence[str],
    overrides: Sequence[str],
    *,
    with_options: Mapping[str, Any],
) -> Request:
    """Options → request, with the files of samples read and nothing else.

    Args:
        router: name or path.
        encoder: directory or package.
        samples: NAME=FILE, or for lorahub FILE.
        overrides: KEY=VALUE.
        with_options: other options that routers from texts do not go with.

    Raises:
        ConfigError: options and settings that do not go together.
        DataError: samples that cannot be read.
    """
    from molora.compose.text_settings import KINDS, BySearch
    from molora.presets.overrides import replaced

    if router is None or router not in KINDS:
        if encoder is not None or samples:
            raise ConfigError(
                f"--encoder and --samples are for the routers {', '.join(KINDS)}. Name one with "
                "--router, or leave them out."
            )
        return Request(router, [*overrides])
    kind = KINDS[router]
    for option, value in with_options.items():
        if value and (option != "--missing" or kind is BySearch):
            raise ConfigError(f"{option} does not go with --router {router}. Leave it out.")
    mine = [o for o in overrides if o.partition("=")[0].partition(".")[0] in kind.model_fields]
    others = [override for override in overrides if override not in mine]
    values = replaced({}, mine)
    for key, default in DEFAULTS.items():
        if isinstance(values.get(key), dict):
            values[key] = {"kind": default, **values[key]}
    by = kind.parse(values)
    if not samples:
        form = "FILE" if isinstance(by, BySearch) else "NAME=FILE for each expert"
        raise ConfigError(f"--router {router} is made from texts: --samples {form}.")
    if isinstance(by, BySearch):
        if encoder is not None:
            raise ConfigError("--router lorahub needs no --encoder. Leave it out.")
        if decided := [override for override in others if override.startswith("router")]:
            raise ConfigError(f"{decided[0]}: --router lorahub has search.… alone. Leave it out.")
        examples = [row for file in samples for row in _rows(Path(file))]
        return Request("given", others, by, examples=examples)
    if encoder is None:
        raise ConfigError(
            f"--router {router} reads texts by an encoder: --encoder with its directory, or with "
            "the package that contains it."
        )
    return Request("given", others, by, encoder, _texts(samples))


def text_router(request: Request, names: Sequence[str], before: Path | None) -> TextRouter | None:
    """Made from the samples, for the mixture's experts `names`; None if none was asked for.

    Args:
        request: with samples.
        names: in order.
        before: a mixture whose centroids stay for experts without samples, if it has some.

    Raises:
        ConfigError: samples of an expert that is not there, or an expert without samples.
    """
    from molora.compose.centroids import build_centroids
    from molora.compose.classifier import train_classifier
    from molora.compose.retrieval import Retriever
    from molora.compose.text_router import TextRouter
    from molora.compose.text_settings import ByClassifier, ByRetriever
    from molora.config.base import unknown_name

    by, samples = request.by, request.samples or {}
    if not isinstance(by, ByRetriever | ByClassifier):
        return None
    for name in samples:
        if name not in names:
            raise ConfigError(f"--samples: {unknown_name('expert', name, list(names))}")
    kept = _kept(by, before, [name for name in names if name not in samples])
    assert request.encoder is not None
    encoder = load_encoder(request.encoder)
    if isinstance(by, ByRetriever):
        centroids = build_centroids(encoder, samples, instruction=by.instruction)
        centroids = (centroids if kept is None else centroids.joined(kept)).ordered(names)
        keep = by.keep or ("start" if by.every is None else "end")
        return TextRouter(Retriever(encoder, centroids, by.weights, keep), by.every)
    pairs = [(text, name) for name in names for text in samples[name]]
    texts, labels = zip(*pairs, strict=True)
    classifier = train_classifier(
        encoder, texts, labels, names=names, select=by.select, keep=by.keep
    )
    typer.echo(f"classifier  {classifier.accuracy(texts, labels):.1%} of {len(texts)} samples")
    return TextRouter(classifier, by.every)


def _kept(
    by: ByRetriever | ByClassifier, before: Path | None, lacking: Sequence[str]
) -> Centroids | None:
    """The centroids that a mixture has of experts without samples."""
    from molora.compose.centroids import STEM, load_centroids
    from molora.compose.text_router import has_text_router, read_text_router
    from molora.compose.text_settings import ByRetriever

    if not lacking:
        return None
    if isinstance(by, ByRetriever) and before is not None and has_text_router(before):
        found = read_text_router(before)
        if found.stored_as == f"{STEM}.json" and set(lacking) <= set(found.names):
            return load_centroids(before).ordered(lacking)
    raise ConfigError(f"--samples has no texts of the expert {lacking[0]}: give {lacking[0]}=FILE.")


def _names(source: Path | None, experts: FrozenExperts | None, drop: Sequence[str]) -> list[str]:
    """The experts that the mixture will have."""
    from molora import io
    from molora.compose.edit import imported_form

    own = () if source is None else imported_form(io.read_manifest(source).mixture).names
    added = () if experts is None else experts.names
    return [*(name for name in own if name not in drop), *added]


def made(
    request: Request,
    base: Base,
    source: Path | None,
    settings: Mapping[str, Any],
    experts: FrozenExperts | None,
    chosen: Mapping[str, Any],
) -> tuple[Mixture, TextRouter | None]:
    """The mixture of experts that were read, or of a saved one, with the router that is asked for;
    and what makes its gates, which is made first.

    Args:
        request: what it is to decide by.
        base: the base.
        source: the saved mixture, if there is one.
        settings: of router and mixture.
        experts: that were read, if any.
        chosen: further arguments of `compose`, and `drop`.

    Raises:
        ConfigError: samples that do not fit the experts, before the base is loaded.
    """
    from molora.cli.composing import composed, edited
    from molora.compose.text_settings import BySearch
    from molora.train.loading import load_tokenizer

    names = _names(source, experts, chosen["drop"])
    router_of_texts = text_router(request, names, source)
    searches = isinstance(request.by, BySearch)
    # weights of all linears alike: what an expert lacks is nothing there, while searching and later
    arguments = {**chosen, "missing": "zero" if searches else chosen["missing"]}
    if source is None:
        del arguments["drop"]

    def make(router: Any) -> Mixture:
        with_router = {**settings, "router": router}
        if source is None:
            return composed(base, with_router, experts, arguments)
        return edited(base, source, with_router, experts, arguments)

    if searches:
        return searched(request, make, load_tokenizer(base.config)), None
    return make(settings["router"]), router_of_texts


def save(mixture: Mixture, router: TextRouter | None, source: Path | None, out: Path) -> None:
    """Save the mixture with its text router, or with that of the mixture that it comes from.

    Raises:
        CheckpointError: a directory that cannot be written.
    """
    from molora.cli.text_routing import is_given, unknown_to_text_router
    from molora.compose.edit import imported_form
    from molora.compose.text_router import copy_text_router, has_text_router

    names = imported_form(mixture.config).names
    mixture.save(out)
    if router is not None:
        router.save(out)
    elif source is not None and is_given(mixture.config) and has_text_router(source):
        if source.resolve() != out.resolve():
            copy_text_router(source, out)
        if lacking := unknown_to_text_router(out, names):
            typer.echo(
                f"note     its text router does not know {', '.join(lacking)}: give --router "
                "retriever or classifier, with --samples"
            )


def searched(request: Request, make: Callable[[Any], Mixture], tokenizer: Any) -> Mixture:
    """The mixture with the weights that the examples ask for, which are printed.

    Args:
        request: with examples.
        make: router → the mixture with it, on the base.
        tokenizer: of the base.
    """
    from molora.cli.inspect import aligned
    from molora.compose.few_shot import few_shot_weights
    from molora.compose.text_settings import BySearch
    from molora.generate import completion_loss

    assert isinstance(request.by, BySearch)
    mixture = make({"kind": "given"})

    def loss() -> float:
        nll, tokens = completion_loss(mixture.model, tokenizer, request.examples)
        return nll / tokens

    try:
        options = request.by.search.model_dump()
        found = few_shot_weights(mixture, loss, examples=len(request.examples), **options)
    finally:
        mixture.detach()
    rows = [("expert", "weight"), *((name, f"{w:.4f}") for name, w in found.weights.items())]
    for line in aligned(rows):
        typer.echo(line)
    tried = f"{len(found.result.trials)} weights tried by {found.result.method}"
    typer.echo(
        f"loss     {found.loss:.4f} of {len(request.examples)} examples, {found.base_loss:.4f} by "
        f"the base alone; {tried}"
    )
    return make({"kind": "fixed", "weights": found.weights})


def _texts(samples: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in samples:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise ConfigError(f"--samples {pair!r} is not of the form NAME=FILE.")
        found.setdefault(name, []).extend(_lines(Path(file)))
    return found


def _lines(path: Path) -> list[str]:
    """A file's samples: its lines, or of rows what a user would say."""
    if path.suffix in OF_ROWS:
        return [_asked(row) for row in _rows(path)]
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the samples {path} cannot be read: {error}. Give text in UTF-8 with one on every "
            f"line, or rows ({', '.join(OF_ROWS)})."
        ) from None
    if not lines:
        raise DataError(f"{path} has no samples. Give one on every line.")
    return lines


def _rows(path: Path) -> list[Row]:
    from molora.config.data import DataSource
    from molora.data import read

    return list(read(DataSource(path=path)))


def _asked(row: Row) -> str:
    """What stands before the answer, as `molora generate` would be given it."""
    from molora.generate.text import text_of

    if row.messages is not None:
        answered = row.messages[-1]["role"] == "assistant"
        return text_of(row.messages[:-1] if answered else row.messages)
    return row.prompt if row.prompt is not None else str(row.text)

"""What makes gates of texts, saved beside the mixture that reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import StoppingCriteriaList

from molora.attach import Mixture
from molora.compose import centroids, classifier
from molora.compose.centroids import load_centroids
from molora.compose.classifier import Classes, TextClassifier, TopPClasses, load_classifier
from molora.compose.edit import imported_form
from molora.compose.encoder import Encoder, EncoderIdentity, Keep
from molora.compose.experts import Names
from molora.compose.generation import gates_by_text
from molora.compose.retrieval import Retriever, TopKMean, Weights
from molora.config.base import Frozen
from molora.errors import CheckpointError, ConfigError
from molora.io import atomic, sealed
from molora.io.files import contained, sha256

FORMAT_VERSION = 1
MANIFEST = "text_router.json"
REMEDY = "Make the text router again, or take an undamaged copy."


class RetrieverSettings(Frozen):
    """Cosines with centroids decide."""

    kind: Literal["retriever"] = "retriever"
    weights: Weights = Field(default_factory=TopKMean)
    """How cosines become gates."""
    keep: Keep = "start"
    """The part of a text too long for the encoder that counts."""


class ClassifierSettings(Frozen):
    """A trained classifier decides; the part of a text that it reads is stored with it."""

    kind: Literal["classifier"] = "classifier"
    select: Classes = Field(default_factory=TopPClasses)
    """How probabilities become gates."""


class TextRouterManifest(Frozen):
    """`text_router.json` without its checksum."""

    format_version: int = Field(ge=1, le=FORMAT_VERSION)
    """Version of this format."""
    decides: Annotated[RetrieverSettings | ClassifierSettings, Field(discriminator="kind")]
    """What decides, and how."""
    every: PositiveInt | None
    """Tokens for which gates stay while text is written; None: those of the prompt stay."""
    names: Names
    """The experts."""
    encoder: EncoderIdentity
    """The encoder, of which nothing else is stored."""
    part: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of `centroids.json` or `classifier.json`."""

    @property
    def stored_as(self) -> str:
        """The file that describes what decides."""
        retrieves = isinstance(self.decides, RetrieverSettings)
        return f"{centroids.STEM if retrieves else classifier.STEM}.json"


@dataclass(frozen=True, eq=False)
class TextRouter:
    """Texts → gates, for a mixture whose router is "given".

    Attributes:
        decides: by centroids or by a classifier, the experts in the order of the mixture's.
        every: tokens for which gates stay while text is written (token-level adaptation,
            2311.10847: 1 or 2); None: those of the prompt stay (LoraRetriever, DLP-LoRA).

    Raises:
        ConfigError: `every` below 1.
    """

    decides: Retriever | TextClassifier
    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError(f"every={self.every}: gates are renewed after 1 token or more.")

    @property
    def names(self) -> tuple[str, ...]:
        """The experts in order."""
        decides = self.decides
        return decides.centroids.names if isinstance(decides, Retriever) else decides.names

    def gates(self, texts: Sequence[str]) -> Tensor:
        """Of N texts: (N, E) float32, 0 or more, each row of sum 1."""
        return self.decides.gates(texts)

    def ordered(self, names: Sequence[str]) -> TextRouter:
        """For the experts `names`, in that order, which is to be that of the mixture's experts.

        Raises:
            ConfigError: an expert that this router does not know.
        """
        if isinstance(self.decides, Retriever):
            found = self.decides.centroids.ordered(names)
            return replace(self, decides=replace(self.decides, centroids=found))
        return replace(self, decides=self.decides.ordered(names))

    def deciding(
        self, mixture: Mixture, tokenizer: Any
    ) -> Callable[[Sequence[str]], AbstractContextManager[StoppingCriteriaList]]:
        """What `molora.generate.generate_texts` takes: the texts of each batch decide.

        Args:
            mixture: of this router's experts, in their order.
            tokenizer: of its model.

        Raises:
            ConfigError: a mixture of other experts, or in another order.
        """
        if self.names != imported_form(mixture.config).names:
            raise ConfigError(
                "the text router has other experts than the mixture, or in another order. Use "
                "router.ordered(names) with the mixture's."
            )
        return lambda texts: gates_by_text(
            mixture, self.gates, texts, tokenizer=tokenizer, every=self.every
        )

    def save(self, directory: str | Path) -> None:
        """Write `text_router.json`, and the centroids or the classifier; what was saved there
        before is replaced. A save that was cut off is noticed when it is loaded.

        Raises:
            CheckpointError: a directory that cannot be written.
        """
        place, decides = Path(directory), self.decides
        settings: RetrieverSettings | ClassifierSettings
        if isinstance(decides, Retriever):
            settings = RetrieverSettings(weights=decides.weights, keep=decides.keep)
        else:
            settings = ClassifierSettings(select=decides.select)
        manifest = TextRouterManifest(
            format_version=FORMAT_VERSION,
            decides=settings,
            every=self.every,
            names=self.names,
            encoder=decides.encoder.identity,
            part="0" * 64,
        )
        path = place / MANIFEST
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise CheckpointError(
                f"{path} is a link or a directory, in the place of a file that saving writes. "
                "Remove it, or choose another directory."
            )
        (decides.centroids if isinstance(decides, Retriever) else decides).save(place)
        try:
            part = sha256(place / manifest.stored_as)
            text = sealed.dump(manifest.model_copy(update={"part": part})).encode()
            atomic.put(place, lambda file: file.write_bytes(text), lambda _: MANIFEST)
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be written: {error}. Make room, or choose another directory, "
                "and save again."
            ) from error


def has_text_router(directory: str | Path) -> bool:
    """Whether a text router was saved there."""
    path = Path(directory) / MANIFEST
    return path.exists() or path.is_symlink()


def read_text_router(directory: str | Path) -> TextRouterManifest:
    """What `TextRouter.save` wrote down, with every file of it checked; no encoder is needed.

    Raises:
        CheckpointError: missing, damaged or changed files; or centroids or a classifier that were
            not saved with it.
    """
    found = _manifest(directory)
    load_text_router(directory, _Known(found.encoder))
    return found


def _manifest(directory: str | Path) -> TextRouterManifest:
    place = Path(directory)
    parts = f"{MANIFEST} and the files of what decides"
    path = contained(place, MANIFEST, what="a text router", parts=parts)
    text = sealed.read_text(path)
    found = sealed.parse(
        text, TextRouterManifest, where=str(path), newest=FORMAT_VERSION, remedy=REMEDY
    )
    part = contained(place, found.stored_as, what="a text router", parts=parts)
    try:
        digest = sha256(part)
    except OSError as error:
        raise CheckpointError(f"{part} cannot be read: {error}.") from None
    if digest != found.part:
        raise CheckpointError(
            f"{part} is not what {MANIFEST} was saved with: it was changed, or saving was cut off. "
            f"{REMEDY}"
        )
    return found


def load_text_router(directory: str | Path, encoder: Encoder) -> TextRouter:
    """Read what `TextRouter.save` wrote. Its experts are in the order in which they were saved:
    `ordered` puts them into that of a mixture.

    Args:
        directory: that of the mixture.
        encoder: the one that it was made with.

    Raises:
        CheckpointError: missing, damaged or changed files.
        ConfigError: another encoder.
    """
    manifest = _manifest(directory)
    settings = manifest.decides
    found: Retriever | TextClassifier
    if isinstance(settings, RetrieverSettings):
        stored = load_centroids(directory)
        found = Retriever(encoder, stored, settings.weights, settings.keep)
    else:
        found = load_classifier(directory, encoder, select=settings.select)
    router = TextRouter(found, manifest.every)
    same = found.encoder.identity.sha256 == manifest.encoder.sha256
    if router.names != manifest.names or not same:
        raise CheckpointError(
            f"{MANIFEST} in {directory} names other experts or another encoder than "
            f"{manifest.stored_as}. {REMEDY}"
        )
    return router


@dataclass(frozen=True)
class _Known:
    """An encoder of which no more is there than its identity."""

    identity: EncoderIdentity

    def encode(self, texts: Sequence[str], *, keep: Keep = "start") -> Tensor:
        raise ConfigError(f"the encoder {self.identity.name} is not here.")


def copy_text_router(source: str | Path, target: str | Path) -> None:
    """Save the text router of `source` in `target` too; no encoder is needed.

    Raises:
        CheckpointError: damaged files, or a directory that cannot be written.
    """
    load_text_router(source, _Known(_manifest(source).encoder)).save(target)

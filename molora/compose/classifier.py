"""A small classifier over an encoder's embeddings that says which experts a text is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional

from molora.compose import stored
from molora.compose.centroids import check_encoder
from molora.compose.encoder import Encoder, EncoderIdentity, Keep
from molora.compose.experts import Names, check_names
from molora.compose.retrieval import fewest_that_exceed
from molora.compose.stored import TensorsFile
from molora.config.base import Frozen, unknown_name
from molora.errors import ConfigError, DataError

FORMAT_VERSION = 1
STEM = "classifier"
STEPS = 300
LEARNING_RATE = 1e-2


class TopPClasses(Frozen):
    """The fewest most probable experts whose probabilities together exceed p act.

    weights "double_softmax": gates are softmax over the probabilities of those that act, as the
    authors' code does, so that they are nearly equal; "renormalized": over the sum.
    Source: DLP-LoRA (2410.01497), p = 0.6.
    """

    kind: Literal["top_p"] = "top_p"
    p: float = Field(default=0.6, gt=0, le=1)
    """The mass to reach; the expert that crosses it is included."""
    weights: Literal["double_softmax", "renormalized"] = "double_softmax"
    """How the probabilities of those that act become gates."""


class TopKClasses(Frozen):
    """The k most probable experts act; weights as in `TopPClasses`.

    Source: DLP-LoRA's other mode, k = 2, in which its code takes the softmax of the chosen logits,
    which is "renormalized".
    """

    kind: Literal["top_k"] = "top_k"
    k: PositiveInt = 2
    """How many act; all, if there are fewer experts."""
    weights: Literal["double_softmax", "renormalized"] = "renormalized"
    """How the probabilities of those that act become gates."""


Classes = Annotated[TopPClasses | TopKClasses, Field(discriminator="kind")]


class ClassifierManifest(Frozen):
    """`classifier.json` without its checksum."""

    format_version: int = Field(ge=1, le=FORMAT_VERSION)
    """Version of this format."""
    names: Names
    """The experts, one class each."""
    keep: Keep
    """The part of a text too long for the encoder that counts."""
    encoder: EncoderIdentity
    """The encoder."""
    file: TensorsFile
    """The tensors' file."""


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """probabilities = softmax(W LayerNorm(E(text)) + b), fixed for the whole text.

    Source: DLP-LoRA (2410.01497), whose encoder, an ALBERT or RoBERTa of which it reads the first
    token, is trained too. Deviation: here the encoder is frozen and gives its sentence embedding.

    Attributes:
        encoder: what embeds a text.
        names: the experts in order.
        tensors: norm_weight (D), norm_bias (D), weight (E, D), bias (E), float32.
        select: who acts, with what gate.
        keep: the part of a text too long for the encoder that counts; DLP-LoRA's is the end.
    """

    encoder: Encoder
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    select: Classes = field(default_factory=TopPClasses)
    keep: Keep = "end"

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Of N texts: (N, E) float32, each row of sum 1."""
        return _logits(self.encoder.encode(texts, keep=self.keep), self.tensors).softmax(dim=-1)

    def gates(self, texts: Sequence[str]) -> Tensor:
        """Of N texts: (N, E) float32, 0 or more, each row of sum 1."""
        return gates_from_probabilities(self.probabilities(texts), self.select)

    def accuracy(self, texts: Sequence[str], labels: Sequence[str]) -> float:
        """Share of texts whose most probable expert is the one that the label names.

        Raises:
            DataError: no texts, a label that is no expert, or another number of labels.
        """
        targets_N = _targets(self.names, texts, labels)
        return float((self.probabilities(texts).argmax(dim=-1) == targets_N).float().mean())

    def ordered(self, names: Sequence[str]) -> TextClassifier:
        """The classes of `names`, in that order, which is to be that of the mixture's experts.

        Raises:
            ConfigError: an expert that is no class.
        """
        check_names(names)
        for name in names:
            if name not in self.names:
                raise ConfigError(
                    f"{unknown_name('expert', name, list(self.names))} It is no class: train the "
                    "classifier with texts labelled with it."
                )
        rows = [self.names.index(name) for name in names]
        tensors = dict(self.tensors)
        tensors |= {name: tensors[name][rows] for name in ("weight", "bias")}
        return TextClassifier(self.encoder, tuple(names), tensors, self.select, self.keep)

    def save(self, directory: str | Path) -> None:
        """Write `classifier.json` and its tensors; a classifier saved there before is replaced.
        `select` is not part of it.

        Raises:
            CheckpointError: a directory that cannot be written.
        """

        def describe(file: TensorsFile) -> ClassifierManifest:
            return ClassifierManifest(
                format_version=FORMAT_VERSION,
                names=self.names,
                keep=self.keep,
                encoder=self.encoder.identity,
                file=file,
            )

        stored.write(Path(directory), STEM, self.tensors, describe)


def train_classifier(
    encoder: Encoder,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    names: Sequence[str],
    select: Classes | None = None,
    keep: Keep = "end",
    weight_decay: float = 0.01,
) -> TextClassifier:
    """Learn from texts that are labelled with the name of their expert.

    AdamW on the mean cross entropy of all texts at once, from zero: the same texts give the same
    classifier, and no seed is drawn.

    Args:
        encoder: what embeds the texts; once.
        texts: N of them.
        labels: the expert of each.
        names: the experts in order; each must have a text.
        select: who acts, with what gate; by default DLP-LoRA's.
        keep: the part of a text too long for the encoder that counts.
        weight_decay: AdamW's; more makes probabilities less sure.

    Raises:
        ConfigError: names that cannot be.
        DataError: a label that is no expert, or an expert without texts.
    """
    check_names(names)
    targets_N = _targets(names, texts, labels)
    lacking = [name for name in names if name not in labels]
    if lacking:
        raise DataError(f"no text is labelled {lacking[0]!r}. Give each expert one or more.")
    embedded_ND = encoder.encode(texts, keep=keep)
    tensors = _initial(embedded_ND.shape[1], len(names))
    optimizer = torch.optim.AdamW(tensors.values(), lr=LEARNING_RATE, weight_decay=weight_decay)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(_logits(embedded_ND, tensors), targets_N).backward()
            optimizer.step()
    learned = {name: tensor.detach() for name, tensor in tensors.items()}
    return TextClassifier(encoder, tuple(names), learned, select or TopPClasses(), keep)


def load_classifier(
    directory: str | Path, encoder: Encoder, *, select: Classes | None = None
) -> TextClassifier:
    """Read what `TextClassifier.save` wrote.

    Raises:
        CheckpointError: missing, damaged or changed files.
        ConfigError: another encoder than it was trained with.
    """
    where = str(Path(directory) / f"{STEM}.json")

    def check(found: ClassifierManifest) -> TensorsFile:
        start = _initial(found.encoder.dimension, len(found.names), device="meta")
        shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
        return stored.expect(where, found.file, shapes)

    found, tensors = stored.read(
        Path(directory), STEM, ClassifierManifest, newest=FORMAT_VERSION, check=check
    )
    check_encoder(found.encoder, encoder.identity)
    return TextClassifier(encoder, found.names, tensors, select or TopPClasses(), found.keep)


def gates_from_probabilities(probabilities_NE: Tensor, select: Classes) -> Tensor:
    """Gates (N, E) float32 of sum 1; of experts that are equally probable, the first counts."""
    exact_NE = probabilities_NE.double()
    if isinstance(select, TopPClasses):
        acts_NE = fewest_that_exceed(exact_NE, select.p)
    else:
        order_NE = exact_NE.sort(dim=-1, descending=True, stable=True).indices
        acts_NE = torch.zeros_like(order_NE, dtype=torch.bool)
        acts_NE.scatter_(1, order_NE[:, : select.k], True)
    if select.weights == "double_softmax":
        return exact_NE.masked_fill(~acts_NE, -torch.inf).softmax(dim=-1).float()
    chosen_NE = exact_NE * acts_NE
    return (chosen_NE / chosen_NE.sum(dim=-1, keepdim=True)).float()


def _initial(dimension: int, num_experts: int, *, device: str = "cpu") -> dict[str, Tensor]:
    """Every expert equally probable."""
    tensors = {
        "norm_weight": torch.ones(dimension, device=device),
        "norm_bias": torch.zeros(dimension, device=device),
        "weight": torch.zeros(num_experts, dimension, device=device),
        "bias": torch.zeros(num_experts, device=device),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def _logits(embedded_ND: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    weight, bias = tensors["norm_weight"], tensors["norm_bias"]
    normed_ND = functional.layer_norm(embedded_ND, weight.shape, weight, bias)
    return functional.linear(normed_ND, tensors["weight"], tensors["bias"])


def _targets(names: Sequence[str], texts: Sequence[str], labels: Sequence[str]) -> Tensor:
    if not texts or len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts have {len(labels)} labels. Give one for each text.")
    places = {name: row for row, name in enumerate(names)}
    for label in labels:
        if label not in places:
            raise DataError(unknown_name("label", label, list(places)))
    return torch.tensor([places[label] for label in labels])

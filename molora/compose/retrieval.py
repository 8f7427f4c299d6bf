"""Texts → gates: which experts' texts a text is like, and how much each of them acts.

A mixture whose router is "given" reads the gates: one row per text, the experts in the order of the
centroids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from molora.compose.centroids import Centroids, check_encoder
from molora.compose.encoder import Encoder, Keep
from molora.config.base import Frozen
from molora.errors import ConfigError, DataError

GateFunction = Callable[[Sequence[str]], Tensor]
"""N texts → gates (N, E), float32: `Retriever.gates`, `TextClassifier.gates`."""


class TopKMean(Frozen):
    """Gate 1/k for each of the k experts that the text is most like.

    Source: LoraRetriever (2402.09997): Mixture, k = 3; with k = 1 Selection.
    """

    kind: Literal["top_k_mean"] = "top_k_mean"
    k: PositiveInt = 3
    """How many act; all, if there are fewer experts."""


class TopPMean(Frozen):
    """Equal gates for the fewest experts whose probabilities, softmax(cosine / temperature),
    together exceed p; ours, of top-p and LoraRetriever's mean."""

    kind: Literal["top_p_mean"] = "top_p_mean"
    p: float = Field(default=0.6, gt=0, le=1)
    """The mass to reach; the expert that crosses it is included."""
    temperature: PositiveFloat = 0.1
    """Divides the cosines."""


class SoftmaxWeights(Frozen):
    """Gates softmax(cosine / temperature), of all experts or of the k best.

    Source: token-level adaptation (2311.10847), which does not say its temperature; ours.
    """

    kind: Literal["softmax"] = "softmax"
    temperature: PositiveFloat = 0.1
    """Divides the cosines."""
    k: PositiveInt | None = None
    """How many act; None: all."""


class KernelWeights(Frozen):
    """Gates exp(−(1 − cosine) / width²), over their sum; those that do not exceed `threshold` are
    0, as are all but the `most` largest, and the rest is divided by its sum.

    Source: TTMM, as package ttmerge 0.0.4 computes it. Deviation: the largest always stays.
    """

    kind: Literal["kernel"] = "kernel"
    width: PositiveFloat = 0.2
    """β."""
    threshold: float = Field(default=0.01, ge=0, lt=1)
    """τ."""
    most: PositiveInt = 50
    """How many act at most."""


Weights = Annotated[
    TopKMean | TopPMean | SoftmaxWeights | KernelWeights, Field(discriminator="kind")
]


@dataclass(frozen=True, eq=False)
class Retriever:
    """Gates by the cosines of a text with the experts' centroids.

    Attributes:
        encoder: the encoder that the centroids were made with.
        centroids: in the order of the mixture's experts.
        weights: how cosines become gates.
        keep: the part of a text too long for the encoder that counts; "end" for texts that grow.

    Raises:
        ConfigError: another encoder than that of the centroids.
    """

    encoder: Encoder
    centroids: Centroids
    weights: Weights = field(default_factory=TopKMean)
    keep: Keep = "start"

    def __post_init__(self) -> None:
        check_encoder(self.centroids.encoder, self.encoder.identity)

    def cosines(self, texts: Sequence[str]) -> Tensor:
        """Of N texts with the centroids: (N, E) float32."""
        return self.centroids.cosines(self.encoder, texts, keep=self.keep)

    def gates(self, texts: Sequence[str]) -> Tensor:
        """Of N texts: (N, E) float32, 0 or more, each row of sum 1."""
        return gates_from_cosines(self.cosines(texts), self.weights)


def gates_from_cosines(cosines_NE: Tensor, weights: Weights) -> Tensor:
    """Gates (N, E) float32 of sum 1; of experts that are equally alike, the first counts."""
    exact_NE = cosines_NE.double()
    if isinstance(weights, TopKMean):
        gates_NE = _best(exact_NE, weights.k).double()
    elif isinstance(weights, TopPMean):
        gates_NE = fewest_that_exceed((exact_NE / weights.temperature).softmax(-1), weights.p)
        gates_NE = gates_NE.double()
    elif isinstance(weights, SoftmaxWeights):
        logits_NE = exact_NE / weights.temperature
        if weights.k is not None:
            logits_NE = logits_NE.masked_fill(~_best(exact_NE, weights.k), -torch.inf)
        gates_NE = logits_NE.softmax(dim=-1)
    else:
        # softmax is the kernel over its sum, without the underflow of narrow kernels
        shares_NE = ((exact_NE - 1) / weights.width**2).softmax(dim=-1)
        kept_NE = (shares_NE > weights.threshold) & _best(exact_NE, weights.most)
        gates_NE = shares_NE * (kept_NE | _best(exact_NE, 1))
    return (gates_NE / gates_NE.sum(dim=-1, keepdim=True)).float()


def fewest_that_exceed(probabilities_NE: Tensor, p: float) -> Tensor:
    """The fewest most probable experts of each row whose probabilities together exceed p: bool."""
    sorted_NE, index_NE = probabilities_NE.sort(dim=-1, descending=True, stable=True)
    before_NE = sorted_NE.cumsum(dim=-1) - sorted_NE
    return torch.zeros_like(index_NE, dtype=torch.bool).scatter(1, index_NE, before_NE <= p)


def _best(scores_NE: Tensor, k: int) -> Tensor:
    """The k highest of each row, the first of equal ones: (N, E) bool."""
    index_NK = scores_NE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores_NE, dtype=torch.bool).scatter(1, index_NK, True)


class ContextGates:
    """Gates of a batch while it is written: a loop calls `update` once with the prompts, and then
    after each token, with the texts so far.

    Source: token-level adaptation (2311.10847), `every` = 1, and its faster `every` = 2.
    """

    def __init__(self, gates: GateFunction, *, every: int = 1) -> None:
        """`gates`: e.g. of a `Retriever` with keep="end". `every`: tokens for which gates stay.

        Raises:
            ConfigError: `every` below 1.
        """
        _check_every(every)
        self._gates = gates
        self._every = every
        self._step = 0
        self._current = torch.empty(0, 0)

    def update(self, texts: Sequence[str]) -> Tensor:
        """Gates (B, E) float32 for the next forward: for the whole prompt at first, then for the
        token that each text now ends with.

        Raises:
            DataError: another number of texts than before.
        """
        if self._step and len(texts) != len(self._current):
            raise DataError(
                f"{len(texts)} texts follow on {len(self._current)}. Give all texts of the batch, "
                "or make new ContextGates for another batch."
            )
        if self._step % self._every == 0:
            self._current = self._gates(texts)
        self._step += 1
        return self._current


def token_gates(
    gates: GateFunction,
    tokenizer: Any,
    input_ids: Tensor,
    prompt_lengths: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    every: int = 1,
) -> Tensor:
    """Gates for each token of whole sequences, those that `ContextGates` gives while they are
    written: a prompt's tokens have the gates of the prompt, and a later token those of the text up
    to and with it, or up to the last token before it at which gates were renewed. So no text after
    a token, its prompt aside, changes its gates.

    Args:
        gates: e.g. of a `Retriever` with keep="end".
        tokenizer: of the model that reads the tokens; special tokens are left out of the texts.
        input_ids: (B, S).
        prompt_lengths: for each row how many of its tokens, at least 1, are its prompt.
        attention_mask: (B, S), 0 at padding on either side; by default there is none.
        every: tokens for which gates stay.

    Returns:
        (B, S, E) float32; padding has gates 0.

    Raises:
        ConfigError: `every` below 1.
        DataError: shapes or prompts that do not fit.
    """
    _check_every(every)
    mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask_BS.shape != input_ids.shape or len(prompt_lengths) != len(input_ids):
        raise DataError(
            f"input_ids {list(input_ids.shape)}, attention_mask {list(mask_BS.shape)} and "
            f"{len(prompt_lengths)} prompt lengths do not fit together."
        )
    positions: list[tuple[int, Tensor]] = []
    texts: list[str] = []
    for row, prompt in enumerate(prompt_lengths):
        at = mask_BS[row].bool().nonzero()[:, 0].cpu()
        if not 1 <= prompt <= len(at):
            raise DataError(
                f"row {row} has {len(at)} tokens, of which {prompt} cannot be the prompt. Give 1 "
                f"to {len(at)}."
            )
        ids = input_ids[row].cpu()[at].tolist()
        for end in range(prompt, len(ids) + 1, every):
            # the gates of the text up to `end` are those of its last token and the next ones
            start = 0 if end == prompt else end - 1
            positions.append((row, at[start : end - 1 + every]))
            texts.append(tokenizer.decode(ids[:end], skip_special_tokens=True))
    found_NE = gates(texts)
    result_BSE = found_NE.new_zeros(*input_ids.shape, found_NE.shape[-1])
    for (row, columns), row_E in zip(positions, found_NE, strict=True):
        result_BSE[row, columns] = row_E
    return result_BSE


def _check_every(every: int) -> None:
    if every < 1:
        raise ConfigError(f"every={every}: gates are renewed after 1 token or more.")

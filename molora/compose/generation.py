"""Text decides while it is written: gates of a mixture whose router is "given", during generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from molora.attach import Mixture
from molora.attach.model_scope import GivenGates
from molora.compose.retrieval import ContextGates, GateFunction
from molora.errors import AttachError


class GateRenewal(StoppingCriteria):
    """Called by `generate` after each token: writes new gates for the next forward, stops nothing.

    Args:
        context: gives gates for the texts so far.
        tokenizer: of the model.
        gates_BE: what the mixture reads, changed in place.
    """

    def __init__(self, context: ContextGates, tokenizer: Any, gates_BE: Tensor) -> None:
        self.context = context
        self.tokenizer = tokenizer
        self.gates_BE = gates_BE

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        self.gates_BE.copy_(self.context.update(texts))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def gates_by_text(
    mixture: Mixture,
    gates: GateFunction,
    prompts: Sequence[str],
    *,
    tokenizer: Any = None,
    every: int | None = None,
) -> Iterator[StoppingCriteriaList]:
    """Inside, the mixture's gates are those that `gates` gives for the texts.

        with gates_by_text(mixture, retriever.gates, prompts, tokenizer=tok, every=1) as criteria:
            model.generate(**tok(prompts, …), stopping_criteria=criteria)

    Args:
        mixture: composed with router "given".
        gates: texts → (B, E), e.g. of a `Retriever` or a `TextClassifier`.
        prompts: the batch's texts.
        tokenizer: of the model, where gates are renewed.
        every: tokens for which gates stay (token-level adaptation, 2311.10847: 1 or 2); None: the
            prompts' gates stay for all (LoraRetriever, DLP-LoRA).

    Yields:
        What `generate` needs as `stopping_criteria` for gates to be renewed; it stops nothing. With
        `use_cache=False` a forward reads every token with the newest gates; with a cache, as
        published, each token with those at its time. Beams cannot be renewed: texts change places.

    Raises:
        AttachError: a mixture with another router, or `every` without a tokenizer.
    """
    scope = mixture.built.model_scope
    if not isinstance(scope, GivenGates):
        raise AttachError(
            f"this mixture (method {mixture.config.method!r}) decides by itself. Compose it with "
            "router='given' for gates that come from texts."
        )
    if every is not None and tokenizer is None:
        raise AttachError("gates are renewed by the texts so far: give the model's tokenizer.")
    context = ContextGates(gates, every=every or 1)
    device = next(mixture.model.parameters()).device
    gates_BE = context.update(list(prompts)).to(device).clone()
    if gates_BE.shape != (len(prompts), scope.num_experts):
        raise AttachError(
            f"gates for {len(prompts)} texts and {scope.num_experts} experts have the shape "
            f"{tuple(gates_BE.shape)}. Give those of this mixture's experts, in their order."
        )
    renewals = [] if every is None else [GateRenewal(context, tokenizer, gates_BE)]
    with mixture.context(expert_gates=gates_BE):
        yield StoppingCriteriaList(renewals)

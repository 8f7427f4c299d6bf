"""Decisions for the whole model, made before its forward: X-LoRA's first pass, or given gates."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from molora.attach.caches import PairedCache, check_in_step
from molora.errors import AttachError
from molora.modules import ForwardContext, RoutingSite
from molora.routing.classifier import HiddenStateClassifier

GATES = "expert_gates"
"""Name under which gates are given with a batch."""
FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments by which packed rows are told to attention."""


class GivenGates:
    """The decision is the column `expert_gates` of the batch.

    Args:
        site: what all linears share.
        num_experts: E.
    """

    def __init__(self, site: RoutingSite, num_experts: int) -> None:
        self.site = site
        self.num_experts = num_experts

    def decide(self, columns: Mapping[str, Tensor], grid: tuple[int, int]) -> None:
        """Put the decision for the batch's positions into the context.

        Raises:
            AttachError: no gates, or gates that do not fit the batch.
        """
        gates = columns.get(GATES)
        batch, length = grid
        if gates is None:
            raise AttachError(
                f"this mixture's gates come with the batch. Pass model(..., {GATES}=gates), or run "
                f"inside mixture.context({GATES}=gates), with gates (B, {self.num_experts}) or "
                f"(B, S, {self.num_experts})."
            )
        wrong = gates.dim() not in (2, 3) or gates.shape[-1] != self.num_experts
        wrong = wrong or len(gates) == 0 or batch % len(gates) != 0
        if wrong or (gates.dim() == 3 and gates.shape[1] != length):
            raise AttachError(
                f"{GATES} has shape {tuple(gates.shape)}, but the batch has {batch} rows of "
                f"{length} positions and the mixture {self.num_experts} experts: it must be (B, E) "
                "or (B, S, E)."
            )
        if gates.dim() == 2:
            gates = gates[:, None].expand(-1, length, -1)
        # beams and several returned sequences come as copies of a row beside each other
        gates_BSE = gates.repeat_interleave(batch // len(gates), dim=0).float()
        context = self.site.context
        context.decisions[self.site.name] = self.site.decide_by(gates_BSE.flatten(0, 1), grid)


class FirstPass:
    """The decision is a classifier's, of the final hidden state of a pass before the model's own.

    The first pass runs without gradients and, while decoding, with a cache of its own, so that a
    new token costs two passes over one position (package peft repeats both over all of them).
    Equal to package peft's, since a position's scores depend on those before it alone.

    Source: X-LoRA (2402.07148); quirks as in package peft 0.21.2.

    Args:
        model: the adapted model.
        classifier: (T, in) → (T, L, E).
        sites: L of them, or one for all linears.
        context: shared with the adapted modules.
        score: of every expert in the first pass; 0: it is the base alone.
        num_experts: E.
    """

    def __init__(
        self,
        model: nn.Module,
        classifier: HiddenStateClassifier,
        sites: Sequence[RoutingSite],
        *,
        context: ForwardContext,
        score: float,
        num_experts: int,
    ) -> None:
        self.backbone = backbone_of(model)
        self.names = set(inspect.signature(type(self.backbone).forward).parameters) | set(FLASH)
        self.classifier = classifier
        self.sites = tuple(sites)
        self.context = context
        self.score = score
        self.num_experts = num_experts
        self.running = False

    def decide(
        self, arguments: Mapping[str, Any], grid: tuple[int, int], cache: PairedCache | None
    ) -> None:
        """Run the first pass with the model's arguments and put its decisions into the context."""
        hidden_BSH = self._hidden(arguments, cache, grid)
        logits_TLE = self.classifier(hidden_BSH.flatten(0, 1))
        for number, site in enumerate(self.sites):
            decision = site.decide_by(logits_TLE[:, number], grid)
            self.context.decisions[site.name] = decision

    @torch.no_grad()
    def _hidden(
        self, arguments: Mapping[str, Any], cache: PairedCache | None, grid: tuple[int, int]
    ) -> Tensor:
        """(B, S, H): the base's final hidden state, or that with every expert at `score`."""
        given = {name: value for name, value in arguments.items() if name in self.names}
        given |= {"past_key_values": None, "use_cache": False}
        if cache is not None:
            check_in_step(cache)
            given |= {"past_key_values": cache.first_pass, "use_cache": True}
        with self._as_first_pass(grid):
            output = self.backbone(**given)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
        return hidden

    @contextmanager
    def _as_first_pass(self, grid: tuple[int, int]) -> Iterator[None]:
        """Inside, linears act as the first pass has them and nothing is recorded."""
        context = self.context
        enabled, trace = context.enabled, context.trace
        context.enabled, context.trace, self.running = self.score != 0, None, True
        try:
            if context.enabled:
                rows = grid[0] * grid[1]
                parameter = next(self.classifier.parameters())
                scores_TE = parameter.new_full((rows, self.num_experts), self.score).float()
                for site in self.sites:
                    context.decisions[site.name] = site.decide_by_scores(scores_TE, grid)
            yield
        finally:
            context.enabled, context.trace, self.running = enabled, trace, False


def backbone_of(model: nn.Module) -> nn.Module:
    """What makes the hidden states: the model without its head.

    Raises:
        AttachError: encoder-decoders, and models that are not transformers'.
    """
    config = getattr(model, "config", None)
    backbone = getattr(model, "base_model", None)
    if not isinstance(backbone, nn.Module) or getattr(config, "is_encoder_decoder", False):
        raise AttachError(
            f"X-LoRA reads the final hidden state of a decoder or encoder of transformers; "
            f"{type(model).__name__} is none. Use a router that reads each linear's input."
        )
    return backbone

"""Whole-FFN experts, mixed after the non-linearity (MixLoRA, 2404.15159)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from molora.experts import ExpertBank
from molora.experts.bank import compute_dtype
from molora.modules.context import ForwardContext
from molora.modules.product import is_partitioned
from molora.modules.recompute import recomputed
from molora.modules.site import RoutingSite
from molora.routing.record import Routing


class Projection:
    """A projection of the FFN: the base linear, and a bank unless it is no target.

    A fused projection (Phi-3's gate_up_proj) is one Projection with the outputs of both halves.
    """

    def __init__(self, base: nn.Module, experts: ExpertBank | None) -> None:
        self.base = base
        self.experts = experts

    def is_partitioned(self) -> bool:
        """Whether DeepSpeed divides the experts among processes."""
        return self.experts is not None and is_partitioned(self.experts)

    def product(self, x: Tensor) -> Tensor:
        """(..., in) → (T, out): W x, once for all experts."""
        y = self.base(x)
        return y.reshape(-1, y.shape[-1])

    def per_expert(self, x: Tensor, y_TF: Tensor, routing: Routing) -> Tensor:
        """(..., in) and W x → (T, K, out): W x + scaling · B_e A_e x for the chosen experts."""
        if self.experts is None:
            return _every_slot(y_TF, routing)
        x_TD = x.reshape(-1, x.shape[-1])
        delta_TKF = self.experts(x_TD, None, slots_TK=routing.expert_index)
        return y_TF[:, None] + delta_TKF.to(y_TF.dtype)

    def inputs(self, x: Tensor, routing: Routing) -> list[Tensor]:
        """(..., in) → the tensors that `of_inputs` needs beside W x."""
        if self.experts is None:
            return []
        rows = self.experts.dropped_rows(x.reshape(-1, x.shape[-1]), routing.expert_index)
        return [rows, self.experts.lora_A, self.experts.lora_B]

    def of_inputs(self, y_TF: Tensor, inputs: Sequence[Tensor], routing: Routing) -> Tensor:
        """As `per_expert`, a function of tensors that reads no parameter."""
        if self.experts is None:
            return _every_slot(y_TF, routing)
        rows, lora_A, lora_B = inputs
        index_TK, plans = routing.expert_index, routing.plans
        delta_TKF = self.experts.rows(rows, index_TK, lora_A, lora_B, plans)
        return y_TF[:, None] + delta_TKF.to(y_TF.dtype)


class MoLoRAFeedForward:
    """y = Σ_k gate_k FFN_{e_k}(x), FFN_e being the base FFN with expert e's LoRAs.

    The base down projection is linear, so Σ_k g_k W a_k = W (Σ_k g_k a_k): it runs once per token,
    not once per (token, expert). A bias enters with the sum of the gates.

    Args:
        inputs: the projections that read x: (gate, up), or one fused or plain projection.
        activate: their outputs, each (T, K, F), → (T, K, I), dropout included.
        down: the projection back, (T, I) → (T, out).
        is_deterministic: whether `activate` draws no random numbers at the moment.
        finish: what the FFN does after it, such as dropout.
        site: what decides.
        context: shared state of the model's forward.
        base_forward: the FFN's forward before it was taken over.
        overflow_input: give a token that capacity dropped score · x in place of its expert's
            output, as the switch variant of MixLoRA's code does; x must have as many features as y.
    """

    def __init__(
        self,
        inputs: tuple[Projection, ...],
        activate: Callable[..., Tensor],
        down: Projection,
        *,
        is_deterministic: Callable[[], bool],
        finish: Callable[[Tensor], Tensor],
        site: RoutingSite,
        context: ForwardContext,
        base_forward: Callable[..., Tensor],
        overflow_input: bool = False,
    ) -> None:
        self.inputs = inputs
        self.activate = activate
        self.down = down
        self.is_deterministic = is_deterministic
        self.finish = finish
        self.site = site
        self.context = context
        self.base_forward = base_forward
        self.overflow_input = overflow_input

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) → (..., out) in the base's dtype; the base alone while disabled."""
        if not self.context.enabled:
            return self.base_forward(x, *args, **kwargs)
        routing = self.site.decide(x)
        a_TKI = self._activated(x, routing)
        gates_TK1 = routing.gates.to(compute_dtype(a_TKI))[..., None]
        mixed_TI = (gates_TK1 * a_TKI).sum(dim=1)
        y_TF = self._project_down(mixed_TI, routing)
        if self.down.experts is not None:
            y_TF = y_TF + self._down_delta(a_TKI, routing).to(y_TF.dtype)
        if self.overflow_input:
            y_TF = y_TF + dropped_mass(routing).to(y_TF.dtype)[:, None] * x.reshape(
                -1, x.shape[-1]
            ).to(y_TF.dtype)
        return self.finish(y_TF).view(*x.shape[:-1], -1)

    def _activated(self, x: Tensor, routing: Routing) -> Tensor:
        """(T, K, I): what the activation makes of each slot, of which W x alone is kept.

        The K times larger outputs of the experts are cheap to make again.
        """
        products = [projection.product(x) for projection in self.inputs]
        if not self.is_deterministic():
            return self.activate(*self._per_expert(x, products, routing))
        if any(projection.is_partitioned() for projection in self.inputs):
            # parameters may be read in a call of their own module only, thus not again
            return recomputed(self.activate, *self._per_expert(x, products, routing))
        parts = [projection.inputs(x, routing) for projection in self.inputs]

        def activated(*tensors: Tensor) -> Tensor:
            remaining = iter(tensors)
            outputs = [
                projection.of_inputs(next(remaining), list(islice(remaining, len(part))), routing)
                for projection, part in zip(self.inputs, parts, strict=True)
            ]
            return self.activate(*outputs)

        return recomputed(
            activated, *(t for y, part in zip(products, parts, strict=True) for t in (y, *part))
        )

    def _per_expert(
        self, x: Tensor, products: Sequence[Tensor], routing: Routing
    ) -> Iterator[Tensor]:
        for projection, y_TF in zip(self.inputs, products, strict=True):
            yield projection.per_expert(x, y_TF, routing)

    def _project_down(self, mixed_TI: Tensor, routing: Routing) -> Tensor:
        """W Σ_k g_k a_k + b Σ_k g_k."""
        base = self.down.base
        dtype = _input_dtype(base, mixed_TI)
        if getattr(base, "bias", None) is None:
            return base(mixed_TI.to(dtype))
        # G · (W (m / G) + b), since the bias itself cannot be read here: outside of a call of its
        # module ZeRO-3 has it partitioned
        total_T1 = routing.gates.sum(dim=-1, keepdim=True)
        share_TI = mixed_TI / torch.where(total_T1 == 0, 1.0, total_T1)
        y_TF = base(share_TI.to(dtype))
        return (total_T1 * y_TF).to(y_TF.dtype)

    def _down_delta(self, a_TKI: Tensor, routing: Routing) -> Tensor:
        """Σ_k g_k · scaling · B_k A_k a_k: every (token, slot) is a row with one expert."""
        experts, slots = self.down.experts, routing.gates.shape[1]
        assert experts is not None
        one_slot = Routing(
            logits=None,
            scores=routing.scores.repeat_interleave(slots, dim=0),
            gates=routing.gates.reshape(-1, 1),
            expert_index=routing.expert_index.reshape(-1, 1),
            selected=routing.selected.reshape(-1, 1),
        )
        delta_NF = experts(a_TKI.flatten(0, 1), one_slot)
        return delta_NF.view(-1, slots, delta_NF.shape[-1]).sum(dim=1)


def _every_slot(y_TF: Tensor, routing: Routing) -> Tensor:
    return y_TF[:, None].expand(-1, routing.expert_index.shape[1], -1)


def dropped_mass(routing: Routing) -> Tensor:
    """(T,): sum of the scores of the slots that were selected and then dropped by capacity."""
    scores_TK = routing.scores.gather(1, routing.expert_index)
    return torch.where(routing.selected & (routing.gates == 0), scores_TK, 0.0).sum(dim=-1)


def _input_dtype(linear: nn.Module, x: Tensor) -> torch.dtype:
    """T5 keeps its `wo` in float32 in a half-precision model, and casts what it feeds it."""
    weight = linear.weight
    keeps_float32 = isinstance(weight, Tensor) and weight.dtype == torch.float32
    return (
        torch.float32 if keeps_float32 and not torch.is_autocast_enabled(x.device.type) else x.dtype
    )

"""All experts as two matrix products around a gate on the rank-E·R intermediate.

The cost is that of one LoRA of rank E·R whatever the routing, shapes never depend on it, and
between forward and backward only x, the ungated intermediate and the gates are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_mix(
    x_TD: Tensor,
    gates_TK: Tensor | None,
    expert_index_TK: Tensor | None,
    lora_A_ERD: Tensor,
    lora_B_EFR: Tensor,
    scaling_E: Tensor,
) -> Tensor:
    """As `reference.lora_mix`, for x of shape (T, D)."""
    gates_TE = None
    if gates_TK is not None and expert_index_TK is not None:
        zeros_TE = gates_TK.new_zeros(gates_TK.shape[0], lora_B_EFR.shape[0])
        gates_TE = zeros_TE.scatter(1, expert_index_TK, gates_TK)
    return _DenseMix.apply(x_TD, gates_TE, lora_A_ERD, lora_B_EFR, scaling_E)


class _DenseMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TE: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling_E: Tensor,
    ) -> Tensor:
        dtype = x_TD.dtype
        h_TP = x_TD @ lora_A.to(dtype).flatten(0, 1).T
        h_TER = _per_expert(h_TP, lora_A, lora_B)
        weight_TE1 = _weights(gates_TE, scaling_E, dtype)
        up_PF = rearrange(lora_B.to(dtype), "e f r -> (e r) f")
        # the product itself and not a view of it, which torch.compile cannot save
        ctx.save_for_backward(x_TD, gates_TE, lora_A, lora_B, scaling_E, h_TP)
        return rearrange(h_TER * weight_TE1, "t e r -> t (e r)") @ up_PF

    @staticmethod
    # the intermediate is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gates_TE, lora_A, lora_B, scaling_E, h_TP = ctx.saved_tensors
        h_TER = _per_expert(h_TP, lora_A, lora_B)
        needs_x, needs_gates, needs_A, needs_B, _ = ctx.needs_input_grad
        num_experts, dtype = lora_B.shape[0], x_TD.dtype
        weight_TE1 = _weights(gates_TE, scaling_E, dtype)
        up_PF = rearrange(lora_B.to(dtype), "e f r -> (e r) f")
        grad_TER = rearrange(grad_TF @ up_PF.T, "t (e r) -> t e r", e=num_experts)
        grad_x = grad_gates = grad_A = grad_B = None
        if needs_B:
            mixed_TP = rearrange(h_TER * weight_TE1, "t e r -> t (e r)")
            grad_B = rearrange(grad_TF.T @ mixed_TP, "f (e r) -> e f r", e=num_experts).to(
                lora_B.dtype
            )
        if needs_gates and gates_TE is not None:
            grad_gates = (grad_TER * h_TER).sum(dim=-1).to(gates_TE.dtype) * scaling_E.to(
                gates_TE.dtype
            )
        if needs_A or needs_x:
            grad_h_TP = _grad_down(grad_TER * weight_TE1, shared=lora_A.shape[0] < num_experts)
            if needs_A:
                grad_A = (grad_h_TP.T @ x_TD).view(lora_A.shape).to(lora_A.dtype)
            if needs_x:
                grad_x = grad_h_TP @ lora_A.to(dtype).flatten(0, 1)
        return grad_x, grad_gates, grad_A, grad_B, None


def _per_expert(h_TP: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """x A by expert, (T, E, R); that of a shared A is broadcast without a copy."""
    h_TER = h_TP.view(h_TP.shape[0], lora_A.shape[0], lora_A.shape[1])
    return h_TER.expand(-1, lora_B.shape[0], -1)


def _grad_down(grad_TER: Tensor, *, shared: bool) -> Tensor:
    return grad_TER.sum(dim=1) if shared else grad_TER.flatten(1)


def _weights(gates_TE: Tensor | None, scaling_E: Tensor, dtype: torch.dtype) -> Tensor:
    """gate · scaling, (T, E, 1) or (E, 1), multiplied before rounding to a lower precision."""
    weights = scaling_E if gates_TE is None else gates_TE * scaling_E
    return weights.to(dtype)[..., None]

"""All experts as two matrix products around a gate on the rank-E·R intermediate.

The cost is that of one LoRA of rank E·R whatever the routing, and shapes never depend on it. The
two products are functions of their own: `down` makes the intermediates and router logits of every
projection that reads the same x, `up` gates one of them and adds to the base's product in place.
Between forward and backward only x, the ungated intermediate and the gates are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.base import Base


def lora_mix(
    x_TD: Tensor,
    gates_TK: Tensor | None,
    expert_index_TK: Tensor | None,
    lora_A_ERD: Tensor,
    lora_B_EFR: Tensor,
    scaling_E: Tensor,
    *,
    base: Base | None = None,
) -> Tensor:
    """As `reference.lora_mix`, for x of shape (T, D)."""
    (h_TP,), _ = down(x_TD, [lora_A_ERD], [])
    gates_TE = spread(gates_TK, expert_index_TK, lora_B_EFR.shape[0])
    return up(x_TD, h_TP, gates_TE, lora_B_EFR, scaling_E, base=base)


def spread(
    gates_TK: Tensor | None, expert_index_TK: Tensor | None, num_experts: int
) -> Tensor | None:
    """(T, E): the gate of every expert, 0 where it does not act; None if all act with gate 1."""
    if gates_TK is None or expert_index_TK is None:
        return None
    zeros_TE = gates_TK.new_zeros(gates_TK.shape[0], num_experts)
    return zeros_TE.scatter(1, expert_index_TK, gates_TK)


def down(
    x_TD: Tensor, factors: Sequence[Tensor], routers: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What projections that read the same x make of it, in one product.

    Args:
        x_TD: rows.
        factors: the (E, R, D) down-projections of each.
        routers: the (E, D) weights of linear routers.

    Returns:
        A x of each of `factors`, (T, E·R) in the dtype of x, and logits of each of `routers`,
        (T, E) in at least float32: lower precision ties in top-k. Differentiable in all inputs.
    """
    flat = _Down.apply(x_TD, len(factors), *factors, *routers)
    return list(flat[: len(factors)]), list(flat[len(factors) :])


def up(
    x_TD: Tensor,
    h_TP: Tensor,
    gates_TE: Tensor | None,
    lora_B_EFR: Tensor,
    scaling_E: Tensor,
    *,
    base: Base | None = None,
) -> Tensor:
    """Σ_e gate_e · scaling_e · B_e h_e, or with a base its product of x and that.

    Args:
        x_TD: rows; only the base reads them.
        h_TP: what `down` makes, (T, E·R), or (T, R) of a down-projection that all share.
        gates_TE: the gate of every expert; None: 1.
        lora_B_EFR, scaling_E, base: as for `lora_mix`.

    Returns:
        (T, F) in the dtype of x. Differentiable in x, the intermediate, gates and B.
    """
    if base is None:
        return _Up.apply(None, h_TP, gates_TE, lora_B_EFR, scaling_E, None, None, False)
    return _Up.apply(
        x_TD, h_TP, gates_TE, lora_B_EFR, scaling_E, base.weight, base.bias, base.transposed
    )


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, num_factors: int, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TD, *weights)
        ctx.num_factors = num_factors
        ctx.set_materialize_grads(False)
        outputs: list[Tensor] = []
        for dtype, members in _products(x_TD.dtype, num_factors, weights):
            widths = [member.shape[:-1].numel() for member in members]
            outputs += (x_TD.to(dtype) @ _stacked(members, dtype).T).split(widths, dim=1)
        return tuple(outputs)

    @staticmethod
    # x is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TD, *weights = ctx.saved_tensors
        needs_x, _, *needs_weights = ctx.needs_input_grad
        grad_x: Tensor | None = None
        grad_weights: list[Tensor | None] = []
        for dtype, members in _products(x_TD.dtype, ctx.num_factors, weights):
            first = len(grad_weights)
            chosen = slice(first, first + len(members))
            grad_TP = _gradients(grads[chosen], members, x_TD, dtype)
            if needs_x:
                part = (grad_TP @ _stacked(members, dtype)).to(x_TD.dtype)
                grad_x = part if grad_x is None else grad_x.add_(part)
            if any(needs_weights[chosen]):
                grad_PD = grad_TP.T @ x_TD.to(dtype)
                parts = grad_PD.split([member.shape[:-1].numel() for member in members])
                grad_weights += [
                    part.view(member.shape).to(member.dtype)
                    for part, member in zip(parts, members, strict=True)
                ]
            else:
                grad_weights += [None] * len(members)
        return grad_x, None, *grad_weights


def _products(
    dtype: torch.dtype, num_factors: int, weights: Sequence[Tensor]
) -> list[tuple[torch.dtype, Sequence[Tensor]]]:
    """(dtype of the product, weights that take part): one for all where precision allows."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype == wide or num_factors == len(weights):
        return [(dtype, weights)]
    parts = [(dtype, weights[:num_factors]), (wide, weights[num_factors:])]
    return parts if num_factors else parts[1:]


def _stacked(members: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(P, D)."""
    flat = [member.to(dtype).flatten(0, -2) for member in members]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _gradients(
    grads: Sequence[Tensor | None], members: Sequence[Tensor], x_TD: Tensor, dtype: torch.dtype
) -> Tensor:
    """(T, P); an output that nothing read has gradient 0."""
    parts = [
        x_TD.new_zeros(len(x_TD), member.shape[:-1].numel(), dtype=dtype) if grad is None else grad
        for grad, member in zip(grads, members, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor | None,
        h_TP: Tensor,
        gates_TE: Tensor | None,
        lora_B: Tensor,
        scaling_E: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(h_TP, gates_TE, lora_B, scaling_E, weight)
        ctx.transposed = transposed
        gated_TP = _gated(h_TP, _weights(gates_TE, scaling_E, h_TP.dtype), lora_B)
        up_PF = _up_projection(lora_B, h_TP.dtype)
        if x_TD is None or weight is None:
            return gated_TP @ up_PF
        return Base(weight, bias, transposed).product(x_TD).addmm_(gated_TP, up_PF)

    @staticmethod
    # the intermediate is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        h_TP, gates_TE, lora_B, scaling_E, weight = ctx.saved_tensors
        needs_x, needs_h, needs_gates, needs_B, *_ = ctx.needs_input_grad
        weight_TE1 = _weights(gates_TE, scaling_E, h_TP.dtype)
        grad_x = grad_h = grad_gates = grad_B = None
        if needs_x:
            grad_x = Base(weight, None, ctx.transposed).input_gradient(grad_TF)
        if needs_B:
            # this way round the rows of both operands are contiguous
            grad_PF = _gated(h_TP, weight_TE1, lora_B).T @ grad_TF
            grad_B = rearrange(grad_PF, "(e r) f -> e f r", e=len(lora_B)).to(lora_B.dtype)
        if needs_h or needs_gates:
            grad_TP = grad_TF @ _up_projection(lora_B, h_TP.dtype).T
            grad_TER = grad_TP.view(-1, lora_B.shape[0], lora_B.shape[2])
            if needs_gates and gates_TE is not None:
                products_TE = (grad_TER * _per_expert(h_TP, lora_B)).sum(dim=-1)
                grad_gates = products_TE.to(gates_TE.dtype) * scaling_E.to(gates_TE.dtype)
            if needs_h:
                shared = h_TP.shape[1] < grad_TP.shape[1]
                grad_TER = grad_TER * weight_TE1
                grad_h = grad_TER.sum(dim=1) if shared else grad_TER.flatten(1)
        return grad_x, grad_h, grad_gates, grad_B, None, None, None, None


def _gated(h_TP: Tensor, weight_TE1: Tensor, lora_B: Tensor) -> Tensor:
    return (_per_expert(h_TP, lora_B) * weight_TE1).flatten(1)


def _up_projection(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    return rearrange(lora_B.to(dtype), "e f r -> (e r) f")


def _per_expert(h_TP: Tensor, lora_B: Tensor) -> Tensor:
    """x A by expert, (T, E, R); that of a shared A is broadcast without a copy."""
    return h_TP.unflatten(1, (-1, lora_B.shape[2])).expand(-1, lora_B.shape[0], -1)


def _weights(gates_TE: Tensor | None, scaling_E: Tensor, dtype: torch.dtype) -> Tensor:
    """gate · scaling, (T, E, 1) or (E, 1), multiplied before rounding to a lower precision."""
    weights = scaling_E if gates_TE is None else gates_TE * scaling_E
    return weights.to(dtype)[..., None]

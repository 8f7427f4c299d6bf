"""All experts as two matrix products around a gate on the rank-E·R intermediate.

The cost is that of one LoRA of rank E·R whatever the routing, and shapes never depend on it. The
two products are functions of their own: `down` makes the intermediates and router logits of every
projection that reads the same x, `up` gates one of them and adds to the base's product in place.
Between forward and backward only x, the ungated intermediate and the gates are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.base import Base

FEW = 16
"""Rows up to which the update is summed expert by expert."""


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
        return gates_TK
    zeros_TE = gates_TK.new_zeros(gates_TK.shape[0], num_experts)
    return zeros_TE.scatter(1, expert_index_TK, gates_TK)


def down(
    x_TD: Tensor,
    factors: Sequence[Tensor],
    routers: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """What projections that read the same x make of it, in one product.

    Args:
        x_TD: rows.
        factors: the (E, R, D) down-projections of each.
        routers: the (E, D) weights of linear routers.
        dtype: of the products with factors, if not that of x.
        dropout: probability with which an element of x is 0, the others growing by its complement.
            Only the mask is kept for the backward.

    Returns:
        A x of each of `factors`, (T, E·R), and logits of each of `routers`, (T, E) in at least
        float32: lower precision ties in top-k. Differentiable in all inputs.
    """
    dtype = dtype or x_TD.dtype
    # entering autocast costs as much as a small product
    with _exact(x_TD.device.type):
        if torch.is_grad_enabled():
            flat = _Down.apply(x_TD, dropout, dtype, len(factors), *factors, *routers)
        else:
            kept_TD = torch.native_dropout(x_TD, dropout, True)[0] if dropout > 0 else x_TD
            flat = _downed(kept_TD, dtype, len(factors), (*factors, *routers))
    return list(flat[: len(factors)]), list(flat[len(factors) :])


def _exact(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


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
    if not torch.is_grad_enabled():
        return _upped(x_TD, h_TP, gates_TE, lora_B_EFR, scaling_E, base)
    if base is None:
        return _Up.apply(None, h_TP, gates_TE, lora_B_EFR, scaling_E, None, None, False)
    return _Up.apply(
        x_TD, h_TP, gates_TE, lora_B_EFR, scaling_E, base.weight, base.bias, base.transposed
    )


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        dropout: float,
        dtype: torch.dtype,
        num_factors: int,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        kept_TD, mask_TD = x_TD, None
        if dropout > 0:
            kept_TD, mask_TD = torch.native_dropout(x_TD, dropout, True)
        ctx.save_for_backward(x_TD, mask_TD, *weights)
        ctx.dropout, ctx.dtype, ctx.num_factors = dropout, dtype, num_factors
        ctx.set_materialize_grads(False)
        return _downed(kept_TD, dtype, num_factors, weights)

    @staticmethod
    # x is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TD, mask_TD, *weights = ctx.saved_tensors
        kept_TD = _dropped(x_TD, mask_TD, ctx.dropout)
        needs_x, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        grad_x: Tensor | None = None
        grad_weights: list[Tensor | None] = []
        for dtype, members in _products(ctx.dtype, ctx.num_factors, weights):
            chosen = slice(len(grad_weights), len(grad_weights) + len(members))
            if all(grad is None for grad in grads[chosen]):
                grad_weights += [None] * len(members)
                continue
            grad_TP = _gradients(grads[chosen], members, x_TD, dtype)
            if needs_x:
                grad_x = _add_product(grad_x, grad_TP, _stacked(members, dtype), x_TD.dtype)
            if any(needs_weights[chosen]):
                parts = (grad_TP.T @ kept_TD.to(dtype)).split(_widths(members))
                grad_weights += [
                    part.view(member.shape).to(member.dtype)
                    for part, member in zip(parts, members, strict=True)
                ]
            else:
                grad_weights += [None] * len(members)
        if grad_x is not None:
            grad_x = _dropped(grad_x, mask_TD, ctx.dropout)
        return grad_x, None, None, None, *grad_weights


def _downed(
    x_TD: Tensor, dtype: torch.dtype, num_factors: int, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    outputs: list[Tensor] = []
    for product_dtype, members in _products(dtype, num_factors, weights):
        product_TP = x_TD.to(product_dtype) @ _stacked(members, product_dtype).T
        outputs += [product_TP] if len(members) == 1 else product_TP.split(_widths(members), dim=1)
    return tuple(outputs)


def _add_product(sum_TD: Tensor | None, a_TP: Tensor, b_PD: Tensor, dtype: torch.dtype) -> Tensor:
    if sum_TD is not None and a_TP.dtype == dtype:
        return torch.addmm(sum_TD, a_TP, b_PD, out=sum_TD)
    product_TD = (a_TP @ b_PD).to(dtype)
    return product_TD if sum_TD is None else sum_TD.add_(product_TD)


def _dropped(x_TD: Tensor, mask_TD: Tensor | None, dropout: float) -> Tensor:
    return x_TD if mask_TD is None else x_TD * mask_TD / (1 - dropout)


def _products(
    dtype: torch.dtype, num_factors: int, weights: Sequence[Tensor]
) -> list[tuple[torch.dtype, Sequence[Tensor]]]:
    """(dtype of the product, weights that take part).

    Not one product where both have one dtype: logits would stay in memory with the intermediates.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parts = [(dtype, weights[:num_factors]), (wide, weights[num_factors:])]
    return [(dtype, members) for dtype, members in parts if members]


def _widths(members: Sequence[Tensor]) -> list[int]:
    return [member.shape[:-1].numel() for member in members]


def _stacked(members: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(P, D)."""
    flat = [member.to(dtype).flatten(0, -2) for member in members]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _gradients(
    grads: Sequence[Tensor | None], members: Sequence[Tensor], x_TD: Tensor, dtype: torch.dtype
) -> Tensor:
    """(T, P); an output that nothing read has gradient 0."""
    parts = [
        x_TD.new_zeros(len(x_TD), width, dtype=dtype) if grad is None else grad
        for grad, width in zip(grads, _widths(members), strict=True)
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
        base = None if weight is None else Base(weight, bias, transposed)
        return _upped(x_TD, h_TP, gates_TE, lora_B, scaling_E, base)

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
            grad_ERF = grad_PF.unflatten(0, (lora_B.shape[0], -1))
            grad_B = grad_ERF.transpose(1, 2).to(lora_B.dtype)
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


def _upped(
    x_TD: Tensor | None,
    h_TP: Tensor,
    gates_TE: Tensor | None,
    lora_B: Tensor,
    scaling_E: Tensor,
    base: Base | None,
) -> Tensor:
    dtype = h_TP.dtype
    gated_TP = _gated(h_TP, _weights(gates_TE, scaling_E, dtype), lora_B)
    if len(h_TP) <= FEW:
        # a copy of the factors in another order would take longer than the product
        gated_ETR = gated_TP.unflatten(1, (lora_B.shape[0], -1)).transpose(0, 1)
        up_ERF = lora_B.to(dtype).transpose(1, 2)
        if base is None or x_TD is None:
            return torch.bmm(gated_ETR, up_ERF).sum(dim=0)
        return torch.addbmm(base.product(x_TD), gated_ETR, up_ERF)
    up_PF = _up_projection(lora_B, dtype)
    if base is None or x_TD is None:
        return gated_TP @ up_PF
    y_TF = base.product(x_TD)
    return torch.addmm(y_TF, gated_TP, up_PF, out=y_TF)


def _gated(h_TP: Tensor, weight_TE1: Tensor, lora_B: Tensor) -> Tensor:
    return (_per_expert(h_TP, lora_B) * weight_TE1).flatten(1)


def _up_projection(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    return lora_B.to(dtype).transpose(1, 2).flatten(0, 1)


def _per_expert(h_TP: Tensor, lora_B: Tensor) -> Tensor:
    """x A by expert, (T, E, R); that of a shared A is broadcast without a copy."""
    return h_TP.unflatten(1, (-1, lora_B.shape[2])).expand(-1, lora_B.shape[0], -1)


def _weights(gates_TE: Tensor | None, scaling_E: Tensor, dtype: torch.dtype) -> Tensor:
    """gate · scaling, (T, E, 1) or (E, 1), multiplied before rounding to a lower precision."""
    weights = scaling_E if gates_TE is None else gates_TE * scaling_E
    return weights.to(dtype)[..., None]

"""Only the chosen experts, each on its own rows: rows sorted into groups, one product per group.

Rows are sorted by expert or by set of experts (`kernels.plan`), whichever is cheaper. Between
forward and backward only x, the ungated intermediate, (T·K, R), and the gates are kept; rows are
sorted again in the backward. On the CPU sums have a fixed order; on a GPU the K updates of a row
are added in any, unless rows are sorted by set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.base import Base
from molora.kernels.grouped_product import grouped_outer, grouped_product
from molora.kernels.plan import RowPlan, all_experts, plan_rows


def lora_mix(
    x_TD: Tensor,
    gates_TK: Tensor | None,
    expert_index_TK: Tensor | None,
    lora_A_ERD: Tensor,
    lora_B_EFR: Tensor,
    scaling_E: Tensor,
    *,
    base: Base | None = None,
    plan: RowPlan | None = None,
) -> Tensor:
    """As `reference.lora_mix`, for x of shape (T, D).

    `plan` is that of `expert_index_TK`, where several projections share a routing decision.
    """
    if expert_index_TK is None:
        plan = all_experts(len(x_TD), len(lora_B_EFR), x_TD.device)
    elif plan is None:
        plan = plan_rows(expert_index_TK, len(lora_B_EFR))
    linear = (None, None, False) if base is None else (base.weight, base.bias, base.transposed)
    return _Mix.apply(x_TD, gates_TK, lora_A_ERD, lora_B_EFR, scaling_E, *linear, *plan.tensors())


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TK: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling_E: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        transposed: bool,
        *plan_tensors: Tensor,
    ) -> Tensor:
        plan = RowPlan(*plan_tensors)
        # the largest product first: what it read and wrote is then still in the cache
        y_TF = None if weight is None else Base(weight, bias, transposed).product(x_TD)
        h_NP = down(x_TD, lora_A, plan)
        ctx.save_for_backward(
            x_TD, gates_TK, lora_A, lora_B, scaling_E, weight, h_NP, *plan_tensors
        )
        ctx.transposed = transposed
        gated_NP = _gated(h_NP, _weights(x_TD.dtype, gates_TK, scaling_E, plan), lora_B, plan)
        up_GPF = of_groups(lora_B.transpose(1, 2), plan, x_TD.dtype)
        return _added(y_TF, len(x_TD), plan, grouped_product(gated_NP, up_GPF, plan.offsets_G))

    @staticmethod
    # the intermediate is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gates_TK, lora_A, lora_B, scaling_E, weight, h_NP, *tensors = ctx.saved_tensors
        plan = RowPlan(*tensors)
        needs_x, needs_gates, needs_A, needs_B, *_ = ctx.needs_input_grad
        grad_x = grad_gates = grad_A = grad_B = None
        if needs_x and weight is not None:
            grad_x = Base(weight, None, ctx.transposed).input_gradient(grad_TF)
        weight_NS1 = _weights(x_TD.dtype, gates_TK, scaling_E, plan)
        sorted_NF = grad_TF.index_select(0, plan.order_N)
        if needs_B:
            gated_NP = _gated(h_NP, weight_NS1, lora_B, plan)
            grad_GPF = grouped_outer(gated_NP, sorted_NF, plan.offsets_G)
            grad_B = of_experts(grad_GPF, plan, lora_B.transpose(1, 2)).transpose(1, 2)
        if needs_x or needs_gates or needs_A:
            up_GPF = of_groups(lora_B.transpose(1, 2), plan, x_TD.dtype)
            # products over a long contiguous side are twice as fast as over a strided one
            up_GFP = up_GPF.contiguous().transpose(1, 2)
            grad_NP = grouped_product(sorted_NF, up_GFP, plan.offsets_G)
            grad_NSR = grad_NP.unflatten(1, (-1, lora_B.shape[2]))
            if needs_gates and gates_TK is not None:
                products_NS = (grad_NSR * per_member(h_NP, lora_B, plan)).sum(dim=-1)
                scaled_NS = products_NS.to(gates_TK.dtype) * scaling_E[plan.expert_NS]
                grad_gates = torch.zeros_like(gates_TK)
                grad_gates[plan.order_N[:, None], plan.slot_NS] = scaled_NS.to(gates_TK.dtype)
            grad_NP = summed_where_shared(grad_NSR * weight_NS1, lora_A)
        del sorted_NF
        if needs_x:
            grad_x = down_input_gradient(grad_x, grad_NP, len(x_TD), lora_A, plan)
        if needs_A:
            grad_A = down_factor_gradient(grad_NP, x_TD, lora_A, plan)
        return grad_x, grad_gates, grad_A, grad_B, *[None] * 9


# ------------------------------------------------------------------ the down-projection


def down(x_TD: Tensor, lora_A: Tensor, plan: RowPlan) -> Tensor:
    """A x in sorted order: (N, S·R) of the members of a row's group, (N, R) of a shared A."""
    if _is_shared(lora_A):
        return (x_TD @ lora_A[0].to(x_TD.dtype).T).index_select(0, plan.order_N)
    sorted_ND = x_TD.index_select(0, plan.order_N)
    down_GDP = of_groups(lora_A, plan, x_TD.dtype).transpose(1, 2)
    return grouped_product(sorted_ND, down_GDP, plan.offsets_G)


def summed_where_shared(grad_NSR: Tensor, lora_A: Tensor) -> Tensor:
    """The gradient of what `down` returns from that of every member's part of it."""
    return grad_NSR.sum(dim=1) if _is_shared(lora_A) else grad_NSR.flatten(1)


def down_input_gradient(
    grad_x: Tensor | None, grad_NP: Tensor, num_rows: int, lora_A: Tensor, plan: RowPlan
) -> Tensor:
    """(T, D): the gradient of the rows, added to `grad_x` in place if there is one."""
    if _is_shared(lora_A):
        factor_RD = lora_A[0].to(grad_NP.dtype)
        grad_TR = _added(None, num_rows, plan, grad_NP)
        return grad_TR @ factor_RD if grad_x is None else grad_x.addmm_(grad_TR, factor_RD)
    down_GPD = of_groups(lora_A, plan, grad_NP.dtype)
    return _added(grad_x, num_rows, plan, grouped_product(grad_NP, down_GPD, plan.offsets_G))


def down_factor_gradient(grad_NP: Tensor, x_TD: Tensor, lora_A: Tensor, plan: RowPlan) -> Tensor:
    """The gradient of A, in its shape and dtype."""
    if _is_shared(lora_A):
        grad_TR = _added(None, len(x_TD), plan, grad_NP)
        return (grad_TR.T @ x_TD)[None].to(lora_A.dtype)
    sorted_ND = x_TD.index_select(0, plan.order_N)
    return of_experts(grouped_outer(grad_NP, sorted_ND, plan.offsets_G), plan, lora_A)


def _is_shared(lora_A: Tensor) -> bool:
    return lora_A.shape[0] == 1


# ------------------------------------------------------------------ rows, groups and experts


def _added(target: Tensor | None, num_rows: int, plan: RowPlan, rows_NX: Tensor) -> Tensor:
    """Sorted rows in their places, (T, X), added to `target` in place if there is one."""
    if target is not None:
        return target.index_add_(0, plan.order_N, rows_NX)
    if len(rows_NX) == num_rows:
        return rows_NX.index_select(0, inverse(plan.order_N))
    zeros_TX = rows_NX.new_zeros(num_rows, rows_NX.shape[1])
    return zeros_TX.index_add_(0, plan.order_N, rows_NX)


def inverse(order_N: Tensor) -> Tensor:
    """The inverse of a permutation: reading through it is three times as fast as writing."""
    positions_N = torch.arange(len(order_N), device=order_N.device)
    return torch.zeros_like(order_N).scatter_(0, order_N, positions_N)


def per_member(h_NP: Tensor, lora_B: Tensor, plan: RowPlan) -> Tensor:
    """A x by member of the group, (N, S, R); that of a shared A is broadcast without a copy."""
    members = plan.members_GS.shape[1]
    return h_NP.unflatten(1, (-1, lora_B.shape[2])).expand(-1, members, -1)


def _gated(h_NP: Tensor, weight_NS1: Tensor, lora_B: Tensor, plan: RowPlan) -> Tensor:
    return (per_member(h_NP, lora_B, plan) * weight_NS1).flatten(1)


def _weights(
    dtype: torch.dtype, gates_TK: Tensor | None, scaling_E: Tensor, plan: RowPlan
) -> Tensor:
    """gate · scaling, (N, S, 1), multiplied before rounding to a lower precision."""
    weight_NS = scaling_E[plan.expert_NS]
    if gates_TK is not None:
        weight_NS = weight_NS * gates_TK[plan.order_N[:, None], plan.slot_NS]
    return weight_NS.to(dtype)[..., None]


def of_groups(factor_ERX: Tensor, plan: RowPlan, dtype: torch.dtype) -> Tensor:
    """(G, S·R, X): the factors of each group's members, one above the other."""
    if plan.members_GS.shape[1] == 1:  # group e is expert e
        return factor_ERX.to(dtype)
    chosen_MRX = factor_ERX.to(dtype).contiguous().index_select(0, plan.members_GS.flatten())
    return chosen_MRX.view(len(plan.members_GS), -1, factor_ERX.shape[2])


def of_experts(grad_GPX: Tensor, plan: RowPlan, factor_ERX: Tensor) -> Tensor:
    """(E, R, X): what the groups found, summed in the factor's dtype."""
    if plan.members_GS.shape[1] == 1:
        return grad_GPX.to(factor_ERX.dtype)
    grad_MRX = grad_GPX.reshape(plan.members_GS.numel(), *factor_ERX.shape[1:])
    zeros_ERX = grad_MRX.new_zeros(factor_ERX.shape, dtype=factor_ERX.dtype)
    return zeros_ERX.index_add_(0, plan.members_GS.flatten(), grad_MRX.to(factor_ERX.dtype))

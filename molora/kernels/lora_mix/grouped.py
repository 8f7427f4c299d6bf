"""Only the chosen experts, each on its own rows: rows sorted into groups, one product per group.

Rows are sorted by expert or by set of experts (`kernels.plan`), whichever is cheaper. As in
`dense`, two functions: `down` sorts x once for all projections that read it, `up` gates one of the
intermediates and adds to the base's product in place. Between forward and backward only x, the
ungated intermediate, (T·K, R), and the gates are kept; rows are sorted again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    (h_NP,) = down(x_TD, [lora_A_ERD], plan)
    return up(x_TD, h_NP, gates_TK, lora_B_EFR, scaling_E, plan, base=base)


def down(x_TD: Tensor, factors: Sequence[Tensor], plan: RowPlan) -> list[Tensor]:
    """A x of the experts of each row, for projections that read the same x.

    Args:
        x_TD: rows.
        factors: the (E, R, D) down-projections of each, or (1, R, D) shared by all experts.
        plan: the groups that the rows are sorted into.

    Returns:
        For each of `factors` (N, S·R) in sorted order, (N, R) of a shared one, in the dtype of x.
        Differentiable in x and the factors.
    """
    order_N, offsets_G, members_GS = plan.order_N, plan.offsets_G, plan.members_GS
    return list(_Down.apply(x_TD, order_N, offsets_G, members_GS, *factors))


def up(
    x_TD: Tensor,
    h_NP: Tensor,
    gates_TK: Tensor | None,
    lora_B_EFR: Tensor,
    scaling_E: Tensor,
    plan: RowPlan,
    *,
    base: Base | None = None,
) -> Tensor:
    """Σ_k gate_k · scaling · B h of each row, or with a base its product of x and that.

    Args:
        x_TD: rows; only the base reads their values.
        h_NP: what `down` makes.
        gates_TK, lora_B_EFR, scaling_E, base: as for `lora_mix`.
        plan: that of `down`.

    Returns:
        (T, F) in the dtype of x. Differentiable in x, the intermediate, gates and B.
    """
    linear: tuple[Any, ...] = (None, None, None, False)
    if base is not None:
        linear = (x_TD, base.weight, base.bias, base.transposed)
    return _Up.apply(len(x_TD), h_NP, gates_TK, lora_B_EFR, scaling_E, *linear, *plan.tensors())


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        order_N: Tensor,
        offsets_G: Tensor,
        members_GS: Tensor,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TD, order_N, offsets_G, members_GS, *factors)
        sorted_ND: Tensor | None = None
        outputs: list[Tensor] = []
        for factor in factors:
            if _is_shared(factor):
                outputs.append((x_TD @ factor[0].to(x_TD.dtype).T).index_select(0, order_N))
                continue
            sorted_ND = x_TD.index_select(0, order_N) if sorted_ND is None else sorted_ND
            factor_GPD = _of_groups(factor, members_GS, x_TD.dtype)
            outputs.append(grouped_product(sorted_ND, factor_GPD.transpose(1, 2), offsets_G))
        return tuple(outputs)

    @staticmethod
    # x is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, order_N, offsets_G, members_GS, *factors = ctx.saved_tensors
        needs_x, _, _, _, *needs_factors = ctx.needs_input_grad
        grad_x = torch.zeros_like(x_TD) if needs_x else None
        sorted_ND: Tensor | None = None
        grad_factors: list[Tensor | None] = []
        for grad_NP, factor, needed in zip(grads, factors, needs_factors, strict=True):
            if _is_shared(factor):
                grad_TR = x_TD.new_zeros(len(x_TD), factor.shape[1]).index_add_(0, order_N, grad_NP)
                if grad_x is not None:
                    grad_x.addmm_(grad_TR, factor[0].to(x_TD.dtype))
                grad_factors.append((grad_TR.T @ x_TD)[None].to(factor.dtype) if needed else None)
                continue
            if grad_x is not None:
                factor_GPD = _of_groups(factor, members_GS, x_TD.dtype)
                grad_x.index_add_(0, order_N, grouped_product(grad_NP, factor_GPD, offsets_G))
            if needed:
                sorted_ND = x_TD.index_select(0, order_N) if sorted_ND is None else sorted_ND
                grad_GPD = grouped_outer(grad_NP, sorted_ND, offsets_G)
                grad_factors.append(_of_experts(grad_GPD, members_GS, factor))
            else:
                grad_factors.append(None)
        return grad_x, None, None, None, *grad_factors


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        num_rows: int,
        h_NP: Tensor,
        gates_TK: Tensor | None,
        lora_B: Tensor,
        scaling_E: Tensor,
        x_TD: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        transposed: bool,
        *plan_tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(h_NP, gates_TK, lora_B, scaling_E, weight, *plan_tensors)
        ctx.transposed = transposed
        plan = RowPlan(*plan_tensors)
        gated_NP = _gated(h_NP, _weights(h_NP.dtype, gates_TK, scaling_E, plan), lora_B, plan)
        up_GPF = _of_groups(lora_B.transpose(1, 2), plan.members_GS, h_NP.dtype)
        delta_NF = grouped_product(gated_NP, up_GPF, plan.offsets_G)
        if x_TD is None or weight is None:
            y_TF = delta_NF.new_zeros(num_rows, delta_NF.shape[1])
        else:
            y_TF = Base(weight, bias, transposed).product(x_TD)
        return y_TF.index_add_(0, plan.order_N, delta_NF)

    @staticmethod
    # the intermediate is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        h_NP, gates_TK, lora_B, scaling_E, weight, *saved = ctx.saved_tensors
        plan = RowPlan(*saved)
        _, needs_h, needs_gates, needs_B, _, needs_x, *_ = ctx.needs_input_grad
        sorted_NF = grad_TF.index_select(0, plan.order_N)
        weight_NS1 = _weights(h_NP.dtype, gates_TK, scaling_E, plan)
        grad_x = grad_h = grad_gates = grad_B = None
        if needs_x:
            grad_x = Base(weight, None, ctx.transposed).input_gradient(grad_TF)
        if needs_B:
            gated_NP = _gated(h_NP, weight_NS1, lora_B, plan)
            grad_GPF = grouped_outer(gated_NP, sorted_NF, plan.offsets_G)
            up_ERF = lora_B.transpose(1, 2)
            grad_B = _of_experts(grad_GPF, plan.members_GS, up_ERF).transpose(1, 2)
        if needs_h or needs_gates:
            up_GPF = _of_groups(lora_B.transpose(1, 2), plan.members_GS, h_NP.dtype)
            grad_NP = grouped_product(sorted_NF, up_GPF.transpose(1, 2), plan.offsets_G)
            grad_NSR = grad_NP.unflatten(1, (-1, lora_B.shape[2]))
            if needs_gates and gates_TK is not None:
                products_NS = (grad_NSR * _per_member(h_NP, lora_B, plan)).sum(dim=-1)
                scaled_NS = products_NS.to(gates_TK.dtype) * scaling_E[plan.expert_NS]
                grad_gates = torch.zeros_like(gates_TK)
                grad_gates[plan.order_N[:, None], plan.slot_NS] = scaled_NS.to(gates_TK.dtype)
            if needs_h:
                grad_NSR = grad_NSR * weight_NS1
                shared = h_NP.shape[1] < grad_NP.shape[1]
                grad_h = grad_NSR.sum(dim=1) if shared else grad_NSR.flatten(1)
        return None, grad_h, grad_gates, grad_B, None, grad_x, *[None] * 8


def _is_shared(factor: Tensor) -> bool:
    return factor.shape[0] == 1


def _per_member(h_NP: Tensor, lora_B: Tensor, plan: RowPlan) -> Tensor:
    """A x by member of the group, (N, S, R); that of a shared A is broadcast without a copy."""
    members = plan.members_GS.shape[1]
    return h_NP.unflatten(1, (-1, lora_B.shape[2])).expand(-1, members, -1)


def _gated(h_NP: Tensor, weight_NS1: Tensor, lora_B: Tensor, plan: RowPlan) -> Tensor:
    return (_per_member(h_NP, lora_B, plan) * weight_NS1).flatten(1)


def _weights(
    dtype: torch.dtype, gates_TK: Tensor | None, scaling_E: Tensor, plan: RowPlan
) -> Tensor:
    """gate · scaling, (N, S, 1), multiplied before rounding to a lower precision."""
    weight_NS = scaling_E[plan.expert_NS]
    if gates_TK is not None:
        weight_NS = weight_NS * gates_TK[plan.order_N[:, None], plan.slot_NS]
    return weight_NS.to(dtype)[..., None]


def _of_groups(factor_ERX: Tensor, members_GS: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, S·R, X): the factors of each group's members, one above the other."""
    factor_ERX = factor_ERX.to(dtype)
    if members_GS.shape[1] == 1:  # group e is expert e
        return factor_ERX
    chosen_MRX = factor_ERX.contiguous().index_select(0, members_GS.flatten())
    return chosen_MRX.view(len(members_GS), -1, factor_ERX.shape[2])


def _of_experts(grad_GPX: Tensor, members_GS: Tensor, factor_ERX: Tensor) -> Tensor:
    """(E, R, X): what the groups found, summed in the factor's dtype."""
    if members_GS.shape[1] == 1:
        return grad_GPX.to(factor_ERX.dtype)
    grad_MRX = grad_GPX.reshape(members_GS.numel(), *factor_ERX.shape[1:])
    zeros_ERX = factor_ERX.new_zeros(factor_ERX.shape)
    return zeros_ERX.index_add_(0, members_GS.flatten(), grad_MRX.to(factor_ERX.dtype))

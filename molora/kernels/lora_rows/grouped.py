"""Only the chosen experts, each on its own rows: rows sorted into groups, one product per group.

The down-projection is that of `lora_mix.grouped`. Up-projections go slot by slot of a group, so
that each writes rows of its own. Between forward and backward only x and the intermediate are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.grouped_product import grouped_outer, grouped_product
from molora.kernels.lora_mix.grouped import (
    down,
    down_factor_gradient,
    down_input_gradient,
    inverse,
    per_member,
    summed_where_shared,
)
from molora.kernels.plan import RowPlan, plan_rows


def lora_rows(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    lora_A_ERD: Tensor,
    lora_B_EFR: Tensor,
    scaling_E: Tensor,
    *,
    plan: RowPlan | None = None,
) -> Tensor:
    """As `reference.lora_rows`; `plan` is that of `expert_index_TK`, where ops share a decision."""
    if plan is None:
        plan = plan_rows(expert_index_TK, len(lora_B_EFR))
    top_k = expert_index_TK.shape[1]
    rows_MF = _Rows.apply(top_k, x_TD, lora_A_ERD, lora_B_EFR, scaling_E, *plan.tensors())
    return rows_MF.unflatten(0, expert_index_TK.shape)


class _Rows(torch.autograd.Function):
    """(T·K, F): scaling · B A x of every slot of every row."""

    @staticmethod
    def forward(
        ctx: Any,
        top_k: int,
        x_TD: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling_E: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        plan = RowPlan(*tensors)
        h_NP = down(x_TD, lora_A, plan)
        ctx.save_for_backward(x_TD, lora_A, lora_B, scaling_E, h_NP, *tensors)
        ctx.top_k = top_k
        scaled_NSR = _scaled(h_NP, lora_B, scaling_E, plan)
        up_ERF = lora_B.to(h_NP.dtype).transpose(1, 2).contiguous()
        places = _places(plan, top_k)
        sorted_MF = _stacked(
            [
                grouped_product(scaled_NSR[:, s], _of_member(up_ERF, plan, s), plan.offsets_G)
                for s in range(len(places))
            ]
        )
        return sorted_MF.index_select(0, inverse(_stacked(places)))

    @staticmethod
    # the intermediate is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, grad_MF: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, lora_A, lora_B, scaling_E, h_NP, *tensors = ctx.saved_tensors
        plan = RowPlan(*tensors)
        _, needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        scaled_NSR = _scaled(h_NP, lora_B, scaling_E, plan)
        up_ERF = lora_B.to(h_NP.dtype).transpose(1, 2).contiguous()
        grad_ERF = torch.zeros_like(up_ERF, dtype=lora_B.dtype) if needs_B else None
        grad_NSR = torch.empty_like(scaled_NSR)
        for s, place_N in enumerate(_places(plan, ctx.top_k)):
            sorted_NF = grad_MF.index_select(0, place_N)
            if grad_ERF is not None:
                part_GRF = grouped_outer(scaled_NSR[:, s], sorted_NF, plan.offsets_G)
                grad_ERF.index_add_(0, plan.members_GS[:, s], part_GRF.to(lora_B.dtype))
            if needs_x or needs_A:
                down_GFR = _of_member(up_ERF, plan, s).transpose(1, 2)
                grad_NSR[:, s] = grouped_product(sorted_NF, down_GFR, plan.offsets_G)
        grad_x = grad_A = None
        grad_NSR *= _scaling(scaling_E, plan, h_NP.dtype)
        grad_NP = summed_where_shared(grad_NSR, lora_A)
        if needs_x:
            grad_x = down_input_gradient(None, grad_NP, len(x_TD), lora_A, plan)
        if needs_A:
            grad_A = down_factor_gradient(grad_NP, x_TD, lora_A, plan)
        grad_B = None if grad_ERF is None else grad_ERF.transpose(1, 2)
        return None, grad_x, grad_A, grad_B, None, *[None] * 5


def _scaled(h_NP: Tensor, lora_B: Tensor, scaling_E: Tensor, plan: RowPlan) -> Tensor:
    """scaling · A x by member of the group, (N, S, R)."""
    return per_member(h_NP, lora_B, plan) * _scaling(scaling_E, plan, h_NP.dtype)


def _scaling(scaling_E: Tensor, plan: RowPlan, dtype: torch.dtype) -> Tensor:
    return scaling_E.to(dtype)[plan.expert_NS][..., None]


def _of_member(up_ERF: Tensor, plan: RowPlan, position: int) -> Tensor:
    """(G, R, F): the factors of every group's member at one position."""
    if plan.members_GS.shape[1] == 1:  # group e is expert e
        return up_ERF
    return up_ERF.index_select(0, plan.members_GS[:, position])


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _places(plan: RowPlan, top_k: int) -> list[Tensor]:
    """For every position in a group, the index of each sorted row among the T·K slots."""
    return list((plan.order_N[:, None] * top_k + plan.slot_NS).unbind(dim=1))

"""One down-projection for all experts; the chosen intermediates share one up-projection.

Products are those of all E experts for every slot, whatever the routing. Between forward and
backward only x and the chosen intermediates, (T, K, R), are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_rows(
    x_TD: Tensor, expert_index_TK: Tensor, lora_A_ERD: Tensor, lora_B_EFR: Tensor, scaling_E: Tensor
) -> Tensor:
    """As `reference.lora_rows`; A x is computed once per row, however many slots it has."""
    return _Rows.apply(x_TD, expert_index_TK, lora_A_ERD, lora_B_EFR, scaling_E)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        expert_index_TK: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling_E: Tensor,
    ) -> Tensor:
        h_TER = (x_TD @ _down_projection(lora_A, x_TD).T).unflatten(1, (-1, lora_B.shape[2]))
        h_TER = h_TER.expand(-1, len(lora_B), -1)
        scaling_TK1 = scaling_E.to(x_TD.dtype)[expert_index_TK][..., None]
        h_TKR = h_TER.gather(1, _slots(expert_index_TK, h_TER)) * scaling_TK1
        ctx.save_for_backward(x_TD, expert_index_TK, lora_A, lora_B, scaling_E, h_TKR)
        rows_MF = _spread(h_TKR, expert_index_TK, len(lora_B)) @ _up_projection(lora_B, x_TD)
        return rows_MF.unflatten(0, expert_index_TK.shape)

    @staticmethod
    # the intermediate is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, grad_TKF: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, expert_index_TK, lora_A, lora_B, scaling_E, h_TKR = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, _ = ctx.needs_input_grad
        grad_MF = grad_TKF.flatten(0, 1)
        grad_x = grad_A = grad_B = None
        if needs_B:
            # this way round the rows of both operands are contiguous
            grad_PF = _spread(h_TKR, expert_index_TK, len(lora_B)).T @ grad_MF
            grad_ERF = grad_PF.unflatten(0, (lora_B.shape[0], -1))
            grad_B = grad_ERF.transpose(1, 2).to(lora_B.dtype)
        if needs_x or needs_A:
            grad_MP = grad_MF @ _up_projection(lora_B, x_TD).T
            grad_TP = _summed(grad_MP, expert_index_TK, scaling_E, h_TKR)
            if lora_A.shape[0] < lora_B.shape[0]:
                grad_TP = grad_TP.unflatten(1, (-1, lora_B.shape[2])).sum(dim=1)
            if needs_x:
                grad_x = grad_TP @ _down_projection(lora_A, x_TD)
            if needs_A:
                grad_A = (grad_TP.T @ x_TD).view(lora_A.shape).to(lora_A.dtype)
        return grad_x, None, grad_A, grad_B, None


def _spread(h_TKR: Tensor, expert_index_TK: Tensor, num_experts: int) -> Tensor:
    """(T·K, E·R): each slot's intermediate in its expert's place, 0 elsewhere."""
    num_rows, top_k, rank = h_TKR.shape
    zeros_MER = h_TKR.new_zeros(num_rows * top_k, num_experts, rank)
    index_M1R = expert_index_TK.reshape(-1, 1, 1).expand(-1, 1, rank)
    return zeros_MER.scatter_(1, index_M1R, h_TKR.view(-1, 1, rank)).flatten(1)


def _summed(grad_MP: Tensor, expert_index_TK: Tensor, scaling_E: Tensor, h_TKR: Tensor) -> Tensor:
    """(T, E·R): the gradient of every expert's A x, from that of what `_spread` returned."""
    num_rows, top_k, rank = h_TKR.shape
    grad_MER = grad_MP.unflatten(1, (-1, rank))
    index_M1R = expert_index_TK.reshape(-1, 1, 1).expand(-1, 1, rank)
    chosen_TKR = grad_MER.gather(1, index_M1R).view(num_rows, top_k, rank)
    chosen_TKR = chosen_TKR * scaling_E.to(grad_MP.dtype)[expert_index_TK][..., None]
    zeros_TER = grad_MP.new_zeros(num_rows, grad_MER.shape[1], rank)
    return zeros_TER.scatter_add_(1, _slots(expert_index_TK, zeros_TER), chosen_TKR).flatten(1)


def _slots(expert_index_TK: Tensor, like_TER: Tensor) -> Tensor:
    return expert_index_TK[..., None].expand(-1, -1, like_TER.shape[2])


def _down_projection(lora_A: Tensor, x_TD: Tensor) -> Tensor:
    """(P, D)."""
    return lora_A.to(x_TD.dtype).flatten(0, 1)


def _up_projection(lora_B: Tensor, x_TD: Tensor) -> Tensor:
    """(P, F)."""
    return lora_B.to(x_TD.dtype).transpose(1, 2).flatten(0, 1)

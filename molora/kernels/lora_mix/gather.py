"""Few rows, as when decoding: the factors of every chosen expert are copied out, a set per slot.

The cost is that of reading T·K experts, however many there are, in nine small calls. With many
rows the copies, T·K·R·(D + F) numbers that a backward keeps, cost more than every other backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    if expert_index_TK is None:
        experts_E = torch.arange(len(lora_B_EFR), device=x_TD.device)
        expert_index_TK = experts_E.expand(len(x_TD), -1)
    weighted_M1R, up_MRF = halves(
        x_TD, gates_TK, expert_index_TK, lora_A_ERD, lora_B_EFR, scaling_E
    )
    if base is None:
        return (
            torch.bmm(weighted_M1R, up_MRF)
            .view(*expert_index_TK.shape, lora_B_EFR.shape[1])
            .sum(dim=1)
        )
    y_TF = base.product(x_TD)
    if len(x_TD) == 1:
        return torch.addbmm(y_TF, weighted_M1R, up_MRF)
    return y_TF.add_(
        torch.bmm(weighted_M1R, up_MRF).view(*expert_index_TK.shape, lora_B_EFR.shape[1]).sum(dim=1)
    )


def halves(
    x_TD: Tensor,
    gates_TK: Tensor | None,
    expert_index_TK: Tensor,
    lora_A_ERD: Tensor,
    lora_B_EFR: Tensor,
    scaling_E: Tensor,
) -> tuple[Tensor, Tensor]:
    """gate · scaling · A x, (T·K, 1, R), and Bᵀ, (T·K, R, F), of every slot; gates None: 1.

    Products are of a row vector with a batch of transposed matrices; of a batch of matrices with a
    column they take up to 14 times as long on the CPU.
    """
    (num_rows, top_k), rank = expert_index_TK.shape, lora_B_EFR.shape[2]
    slots = num_rows * top_k
    index_M = expert_index_TK.reshape(-1)
    if lora_A_ERD.shape[0] == 1:
        h_TKR = (x_TD @ lora_A_ERD[0].to(x_TD.dtype).T)[:, None].expand(-1, top_k, -1)
    else:
        chosen_MRD = lora_A_ERD.index_select(0, index_M).to(x_TD.dtype)
        chosen_TDP = chosen_MRD.view(num_rows, top_k * rank, x_TD.shape[1]).transpose(1, 2)
        h_TKR = torch.bmm(x_TD[:, None], chosen_TDP).view(num_rows, top_k, rank)
    weight_TK = scaling_E.index_select(0, index_M).view(num_rows, top_k)
    if gates_TK is not None:
        weight_TK = weight_TK * gates_TK
    weighted_M1R = (h_TKR * weight_TK.to(x_TD.dtype)[..., None]).view(slots, 1, rank)
    return weighted_M1R, lora_B_EFR.index_select(0, index_M).to(x_TD.dtype).transpose(1, 2)

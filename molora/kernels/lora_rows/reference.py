"""The specification: delta_k = scaling · B A x of expert e_k for each slot k, not summed."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_rows(
    x_TD: Tensor, expert_index_TK: Tensor, lora_A_ERD: Tensor, lora_B_EFR: Tensor, scaling_E: Tensor
) -> Tensor:
    """The ungated update of every chosen expert.

    Args:
        x_TD: rows; products run in its dtype.
        expert_index_TK: the experts of a row.
        lora_A_ERD: down-projections; (1, R, D) is shared by all experts.
        lora_B_EFR: up-projections.
        scaling_E: factor of each expert.

    Returns:
        (T, K, F) in the dtype of x. Differentiable in x, A and B.
    """
    dtype = x_TD.dtype
    lora_A_ERD = lora_A_ERD.to(dtype).expand(lora_B_EFR.shape[0], -1, -1)
    delta_TEF = torch.einsum(
        "td,erd,efr,e->tef", x_TD, lora_A_ERD, lora_B_EFR.to(dtype), scaling_E.to(dtype)
    )
    index_TKF = expert_index_TK[:, :, None].expand(-1, -1, delta_TEF.shape[-1])
    return delta_TEF.gather(1, index_TKF)

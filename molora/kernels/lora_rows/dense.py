"""One down-projection for all experts; the chosen intermediates share one up-projection."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def lora_rows(
    x_TD: Tensor, expert_index_TK: Tensor, lora_A_ERD: Tensor, lora_B_EFR: Tensor, scaling_E: Tensor
) -> Tensor:
    """As `reference.lora_rows`; A x is computed once per row, however many slots it has."""
    num_experts, dtype = lora_B_EFR.shape[0], x_TD.dtype
    h_TER = rearrange(
        x_TD @ lora_A_ERD.to(dtype).flatten(0, 1).T, "t (e r) -> t e r", e=lora_A_ERD.shape[0]
    )
    h_TER = h_TER.expand(-1, num_experts, -1) * scaling_E.to(dtype)[:, None]
    chosen_TKE = torch.nn.functional.one_hot(expert_index_TK, num_experts).to(dtype)
    spread_TKP = rearrange(h_TER[:, None] * chosen_TKE[..., None], "t k e r -> t k (e r)")
    return spread_TKP @ rearrange(lora_B_EFR.to(dtype), "e f r -> (e r) f")

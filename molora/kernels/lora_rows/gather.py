"""Few rows, as when decoding: the factors of every chosen expert are copied out, a set per slot."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.kernels.lora_mix.gather import halves


def lora_rows(
    x_TD: Tensor, expert_index_TK: Tensor, lora_A_ERD: Tensor, lora_B_EFR: Tensor, scaling_E: Tensor
) -> Tensor:
    """As `reference.lora_rows`, differentiable any number of times."""
    h_M1R, up_MRF = halves(x_TD, None, expert_index_TK, lora_A_ERD, lora_B_EFR, scaling_E)
    return torch.bmm(h_M1R, up_MRF).view(*expert_index_TK.shape, lora_B_EFR.shape[1])

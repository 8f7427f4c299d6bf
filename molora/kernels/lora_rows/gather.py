"""Few rows, as when decoding: the factors of every chosen expert are copied out, a set per slot."""

from __future__ import annotations

from torch import Tensor

from molora.kernels.lora_mix.gather import updates


def lora_rows(
    x_TD: Tensor, expert_index_TK: Tensor, lora_A_ERD: Tensor, lora_B_EFR: Tensor, scaling_E: Tensor
) -> Tensor:
    """As `reference.lora_rows`, differentiable any number of times."""
    return updates(x_TD, None, expert_index_TK, lora_A_ERD, lora_B_EFR, scaling_E)

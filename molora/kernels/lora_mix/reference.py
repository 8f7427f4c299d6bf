"""The specification: delta = Σ_e gate_e · scaling_e · B_e A_e x, readable, for any dtype."""

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
    """The gated sum of low-rank updates of each row.

    Args:
        x_TD: rows; products run in its dtype. Or (E, T, D), an input of its own for every expert.
        gates_TK, expert_index_TK: which experts act on a row and with what gate; gates alone: slot
            k is expert k; both None: all experts with gate 1.
        lora_A_ERD: down-projections; (1, R, D) is shared by all experts.
        lora_B_EFR: up-projections.
        scaling_E: factor of each expert.
        base: the frozen linear that x goes through too, in the dtype of x.

    Returns:
        (T, F) in the dtype of x: the update, or with a base its product and the update.
        Differentiable in x, gates, A and B.
    """
    dtype = x_TD.dtype
    lora_A_ERD = lora_A_ERD.to(dtype).expand(lora_B_EFR.shape[0], -1, -1)
    equation = "etd,erd->ter" if x_TD.dim() == 3 else "td,erd->ter"
    h_TER = torch.einsum(equation, x_TD, lora_A_ERD)
    h_TER = h_TER * scaling_E.to(dtype)[:, None]
    if gates_TK is not None:
        gates_TE = gates_TK = gates_TK.to(dtype)
        if expert_index_TK is not None:
            gates_TE = torch.zeros_like(h_TER[:, :, 0]).scatter(1, expert_index_TK, gates_TK)
        h_TER = h_TER * gates_TE[:, :, None]
    delta_TF = torch.einsum("ter,efr->tf", h_TER, lora_B_EFR.to(dtype))
    return delta_TF if base is None else base.product(x_TD) + delta_TF

"""Kernels for GPUs that write the rows of every slot once, and sort them for many experts."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from molora.kernels.triton_bank import Bank
from molora.kernels.triton_rows import SharedRows


def lora_rows(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    lora_A_ERD: Tensor,
    lora_B_EFR: Tensor,
    scaling_E: Tensor,
    *,
    plan: SharedRows | None = None,
) -> Tensor:
    """As `reference.lora_rows`, for x in bfloat16, float16 or float32; `plan` as for lora_mix.

    Raises:
        BackendError: triton cannot run here; `triton_launch.require`.
    """
    delta_NF = Bank.apply(
        *(x_TD, None, lora_A_ERD, lora_B_EFR, expert_index_TK, scaling_E),
        *(None, None, False, False, plan),
    )
    return rearrange(delta_NF, "(t k) f -> t k f", k=expert_index_TK.shape[1])

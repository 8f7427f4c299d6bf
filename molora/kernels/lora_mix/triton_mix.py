"""Kernels for GPUs that read x and write y once, whatever the experts, and sort rows for many."""

from __future__ import annotations

from torch import Tensor

from molora.kernels.base import Base
from molora.kernels.triton_bank import Bank
from molora.kernels.triton_rows import SharedRows


def lora_mix(
    x_TD: Tensor,
    gates_TK: Tensor | None,
    expert_index_TK: Tensor | None,
    lora_A_ERD: Tensor,
    lora_B_EFR: Tensor,
    scaling_E: Tensor,
    *,
    base: Base | None = None,
    plan: SharedRows | None = None,
) -> Tensor:
    """As `reference.lora_mix`, for x of shape (T, D) in bfloat16, float16 or float32.

    `plan` is that of `expert_index_TK`, where several projections share a routing decision.

    Raises:
        BackendError: triton cannot run here; `triton_launch.require`.
    """
    if gates_TK is None:
        expert_index_TK = None
    weight, bias, transposed = (None, None, False)
    if base is not None:
        weight, bias, transposed = base.weight, base.bias, base.transposed
    return Bank.apply(
        *(x_TD, gates_TK, lora_A_ERD, lora_B_EFR, expert_index_TK, scaling_E),
        *(weight, bias, transposed, True, plan),
    )

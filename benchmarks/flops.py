"""Formulas for products that torch's counter of floating-point operations does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import addmm_flop, flop_registry, register_flop_formula


def register() -> None:
    """Teach torch.utils.flop_counter the products in place and the grouped ones, once."""
    if torch.ops.aten.addmm_ in flop_registry:
        return
    # the formula takes tensors already
    register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(addmm_flop)
    register_flop_formula(torch.ops.aten._grouped_mm)(grouped_mm_flop)


def grouped_mm_flop(
    a_shape: tuple[int, ...], b_shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    """(N, K) with (G, K, M), or (M, N) with (N, K): each row takes part in one group."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]

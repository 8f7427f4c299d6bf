"""The values of an adapter's tensors: finite, and of a size that can be meant.

Values stay in the mapped file; the products that are computed have the rank's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from molora.errors import CheckpointError
from molora.io.adapter import AdapterModule
from molora.io.peft_keys import PartNames

MAX_NORM = 1e6
"""Of scaling · B A in the Frobenius norm; a weight of the largest models has less than 1e4."""


def checked_module(
    path: Path, module: str, names: PartNames, tensors: Mapping[str, Tensor], scaling: float
) -> AdapterModule:
    """The tensors of one module.

    Raises:
        CheckpointError: values that are not finite or out of every measure.
    """
    lora_A, lora_B = tensors[names.lora_A], tensors[names.lora_B]
    norm = checked_norm(path, module, lora_A, lora_B, scaling)
    for setting, name in names.vectors:
        vector_norm = float(tensors[name].double().norm())
        if not math.isfinite(vector_norm):
            raise CheckpointError(
                f"{path}: {name!a} holds NaN or infinity. Take an undamaged copy."
            )
        vector_norm *= abs(scaling) if setting == "lora_bias" else 1
        _check_size(path, ascii(name), vector_norm)
    bias = None if names.bias is None else tensors[names.bias]
    magnitude = None if names.magnitude is None else tensors[names.magnitude]
    return AdapterModule(lora_A, lora_B, scaling, norm, bias, magnitude)


def checked_norm(path: Path, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """`update_norm`, of which the module or parameter `name` is told.

    Raises:
        CheckpointError: as `checked_module`.
    """
    norm = update_norm(lora_A, lora_B, scaling)
    if not math.isfinite(norm):
        finite = bool(torch.isfinite(lora_A).all())
        raise CheckpointError(
            f"{path}: {'lora_B' if finite else 'lora_A'} of {name} holds NaN or infinity. Take "
            "an undamaged copy."
        )
    _check_size(path, f"the update of {name}", norm)
    return norm


def update_norm(lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """‖scaling · B A‖ from the R × R products: ‖B A‖² = Σ (AAᵀ) ∘ (BᵀB); (…, R, in), (…, out, R).

    Every value is squared in the products, and no square of a finite one overflows in float64: the
    norm is finite exactly if the factors are.
    """
    a_RD, b_FR = lora_A.double(), lora_B.double()
    squared = ((a_RD @ a_RD.mT) * (b_FR.mT @ b_FR)).sum()
    # below 0 by rounding only; NaN stays
    return abs(scaling) * math.sqrt(float(squared.clamp_min(0)))


def _check_size(path: Path, what: str, norm: float) -> None:
    if not norm <= MAX_NORM:
        raise CheckpointError(
            f"{path}: {what} has the norm {norm:.3g}, at most {MAX_NORM:g} can be meant: no weight "
            "is as large, and routers that go by norms would follow it alone. Take an undamaged "
            "copy."
        )

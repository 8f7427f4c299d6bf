"""DoRA's experts: what their magnitudes make of the rows of the base's weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from molora.attach.families import in_out_features
from molora.experts import ExpertBank


@torch.no_grad()
def set_row_scales(model: nn.Module, banks: dict[str, ExpertBank]) -> None:
    """Set each block's `row_scale` = magnitude / ‖rows of W + scaling · B A‖.

    The linears' forwards must be the base's alone meanwhile. As W is frozen, a DoRA expert is the
    rank-R update diag(row_scale) B A and a scale of W's rows (2402.09353, Eq. 5).
    """
    for path, bank in banks.items():
        if not bank.reads_product:
            continue
        weight_FD = base_weight(model.get_submodule(path))
        for block in bank.blocks():
            if block.row_scale is None or block.magnitude is None:
                continue
            for number in range(block.size):
                update_FD = block.lora_B[number].float() @ block.lora_A[number].float()
                rows_F = (weight_FD + block.scaling[number] * update_FD).norm(dim=1)
                block.row_scale[number] = block.magnitude[number].float() / rows_F


def base_weight(linear: nn.Module) -> Tensor:
    """(out, in) float32 of any linear, quantised ones too: what it makes of the unit vectors."""
    in_features, _ = in_out_features(linear)
    first = next(linear.parameters())
    dtype = first.dtype if first.is_floating_point() else torch.float32
    unit_DD = torch.eye(in_features, dtype=dtype, device=first.device)
    with bias_at_zero(linear):
        y_DF: Tensor = linear(unit_DD)
    return y_DF.float().T


@contextmanager
def bias_at_zero(linear: nn.Module) -> Iterator[None]:
    """Inside, the linear's bias is 0: added and taken off again, it would leave its rounding."""
    bias = linear._parameters.get("bias")
    if bias is not None:
        linear._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    try:
        yield
    finally:
        if bias is not None:
            linear._parameters["bias"] = bias

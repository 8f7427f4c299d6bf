"""Starting values of parameters, from the seed and the parameter's own path alone."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.experts import init


def initial(
    name: str,
    shape: tuple[int, ...],
    kind: str,
    std: float,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Kaiming-uniform if `kind` is "kaiming", else normal with `std`; empty on the meta device."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    source = init.generator(seed, name)
    values = init.kaiming(shape, source) if kind == "kaiming" else init.normal(shape, std, source)
    return values.to(device, dtype)

"""How experts start: A random, different for each, B zero; the mixture starts as its base."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on `seed` and the parameter's name alone.

    Not on the order in which sites are built, nor on the world size, nor on the global state.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def empty(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """As torch.empty, also inside DeepSpeed's zero.Init, which has one of its own that casts."""
    return torch.get_rng_state().new_empty(shape, dtype=dtype, device=device)


def kaiming(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Uniform in ±1/√fan_in, fan_in the last dimension: kaiming_uniform, a = √5, per expert."""
    # torch's initialiser would take R·D as the fan-in of a stacked (E, R, D) tensor
    bound = 1 / math.sqrt(shape[-1])
    return empty(shape).uniform_(-bound, bound, generator=source)


def normal(shape: tuple[int, ...], std: float, source: torch.Generator) -> Tensor:
    """Gaussian with mean 0."""
    return empty(shape).normal_(0, std, generator=source)

"""Combinations of E tensors of one shape, value by value, as package peft 0.21.2 defines them.

TIES: arXiv 2306.01708. DARE: arXiv 2311.03099. As in peft, and unlike TIES's authors, the sign of a
value is elected among pruned tensors that are not weighted, and the sum is divided by how many
agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

MajoritySign = Literal["total", "frequency"]
Combination = Callable[[Tensor, Tensor], Tensor]
"""A stack (E, …) and weights (E,) → (…)."""


def weighted_sum(stack_E: Tensor, weights_E: Tensor) -> Tensor:
    """Σ_e w_e t_e."""
    return torch.einsum("e...,e->...", stack_E, weights_E.to(stack_E.dtype))


def elected_mean(
    stack_E: Tensor, weights_E: Tensor, *, majority_sign: MajoritySign = "total"
) -> Tensor:
    """Per value: Σ w_e t_e over those whose sign is the elected one, over their number.

    Args:
        stack_E: (E, …), pruned.
        weights_E: (E,).
        majority_sign: "total": the sign of the sum of the values; "frequency": that which more of
            them have. A draw elects +.
    """
    votes_E = stack_E if majority_sign == "total" else stack_E.sign()
    elected = torch.where(votes_E.sum(dim=0) >= 0, 1.0, -1.0).to(stack_E.dtype)
    agrees_E = stack_E.sign() == elected
    return weighted_sum(stack_E * agrees_E, weights_E) / agrees_E.sum(dim=0).clamp_min(1)


def keep_largest(stack_E: Tensor, density: float) -> Tensor:
    """Of each tensor the `density` · n values of largest magnitude (rounded down), others zero."""
    flat_EN = stack_E.flatten(1)
    if density >= 1:
        return stack_E
    count = int(density * flat_EN.shape[1])
    kept = flat_EN.abs().topk(count, dim=1, sorted=False).indices
    mask_EN = torch.zeros_like(flat_EN).scatter_(1, kept, 1.0)
    return stack_E * mask_EN.view_as(stack_E)


def keep_at_random(stack_E: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each value with probability `density`, divided by it, else zero: the expectation stays."""
    if density >= 1:
        return stack_E
    masks = [
        torch.bernoulli(torch.full(one.shape, density), generator=generator) for one in stack_E
    ]
    return stack_E * torch.stack(masks).to(stack_E) / density


def combination(
    name: str, *, density: float, majority_sign: MajoritySign, generator: torch.Generator
) -> Combination:
    """Which function goes by the name linear, ties, dare_linear, dare_ties or magnitude_prune."""

    def combined(stack_E: Tensor, weights_E: Tensor) -> Tensor:
        if name in ("ties", "magnitude_prune"):
            stack_E = keep_largest(stack_E, density)
        elif name in ("dare_ties", "dare_linear"):
            stack_E = keep_at_random(stack_E, density, generator)
        if name in ("ties", "dare_ties"):
            return elected_mean(stack_E, weights_E, majority_sign=majority_sign)
        return weighted_sum(stack_E, weights_E)

    return combined

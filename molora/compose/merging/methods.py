"""How one module's experts are merged, by method, and what each method needs to be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molora.compose.lego import lego
from molora.compose.merging.elementwise import (
    Combination,
    MajoritySign,
    combination,
    weighted_sum,
)
from molora.compose.merging.factors import (
    computing_type,
    concatenated,
    factored,
    relative_residual,
    truncated,
)
from molora.errors import ConfigError
from molora.io.peft_adapter import AdapterModule

ELEMENTWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods that combine value by value: plain on the factors, with `_svd` on dense updates."""
METHODS = (
    *("cat", "svd", *ELEMENTWISE),
    *("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"),
    *("factor", "lego"),
)
"""Names as in package peft's `add_weighted_adapter`, then ours."""
TAKES_RANK = frozenset(m for m in METHODS if m.endswith("svd")) | {"lego"}
TAKES_DENSITY = frozenset(m for m in METHODS if m.startswith(("ties", "dare", "magnitude")))
TAKES_SIGN = frozenset(m for m in METHODS if m.startswith(("ties", "dare_ties")))
TAKES_SEED = frozenset(m for m in METHODS if m.startswith("dare")) | {"lego"}


@dataclass(frozen=True)
class Options:
    """What a method is told beside the experts and their weights.

    Attributes:
        rank: of the result, for `svd`, `…_svd` and `lego`.
        density: fraction of values that pruning keeps.
        majority_sign: how TIES elects a sign.
        seed: of what is drawn at this module.
    """

    rank: int
    density: float
    majority_sign: MajoritySign
    seed: int


@dataclass(frozen=True, eq=False)
class Combined:
    """One module's result: y += B A x + bias.

    Attributes:
        lora_A: (R, D).
        lora_B: (F, R).
        bias: (F,), or None where no expert has one.
        residual: ‖B A − Σ w ΔW‖ / ‖Σ w ΔW‖; `cat` has 0 by construction.
    """

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    residual: float


def combine(
    method: str,
    modules: Sequence[AdapterModule],
    weights: Sequence[float],
    options: Options,
    *,
    where: str,
) -> Combined:
    """The experts of one module as one pair of factors, by one of `METHODS`.

    Computed in the widest type of the factors, float32 at least. A bias is combined as the updates
    are (by value for the methods that go by values, else by Σ w s bias). `where` names the module,
    for messages.

    Raises:
        ConfigError: different ranks where values of factors are combined.
    """
    dtype = computing_type(modules)
    lora_A = [module.lora_A.to(dtype) for module in modules]
    lora_B = [module.lora_B.to(dtype) for module in modules]
    scalings = [module.scaling for module in modules]
    meant = concatenated(lora_A, lora_B, [w * s for w, s in zip(weights, scalings, strict=True)])
    by_value: Combination = weighted_sum
    if method == "cat":
        return Combined(*meant, _bias(modules, weights, by_value, dtype), 0.0)
    if method == "svd":
        A, B, residual = truncated(*meant, options.rank)
        return Combined(A, B, _bias(modules, weights, by_value, dtype), residual)
    if method == "factor":
        A, B = factor_merge(_stacked(lora_A, where, method), torch.stack(lora_B), weights)
        B = B * scalings[0]
        bias = _bias(modules, weights, by_value, dtype, scaling=scalings[0])
    elif method == "lego":
        A, B = lego(lora_A, lora_B, scalings, weights, rank=options.rank, seed=options.seed)
        bias = _bias(modules, weights, by_value, dtype)
    else:
        by_value = combination(
            method.removesuffix("_svd"),
            density=options.density,
            majority_sign=options.majority_sign,
            generator=torch.Generator().manual_seed(options.seed),
        )
        if method.endswith("_svd"):
            A, B = _by_dense_values(by_value, lora_A, lora_B, scalings, weights, options.rank)
        else:
            stack_ERD = _stacked(lora_A, where, method)
            A, B = by_factor_values(by_value, stack_ERD, torch.stack(lora_B), scalings, weights)
        bias = _bias(modules, weights, by_value, dtype)
    return Combined(A, B, bias, relative_residual((A, B), meant))


def by_factor_values(
    by_value: Combination,
    lora_A_ERD: Tensor,
    lora_B_EFR: Tensor,
    scalings: Sequence[float],
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """A from all A, B from all B, each weighted with √|w s|, A with the sign (package peft's
    linear, ties, dare_… and magnitude_prune). B A then holds products of different experts."""
    products = [w * s for w, s in zip(weights, scalings, strict=True)]
    roots_E = torch.tensor([math.sqrt(abs(p)) for p in products], dtype=torch.float64)
    signs_E = torch.tensor([1.0 if p >= 0 else -1.0 for p in products], dtype=torch.float64)
    return by_value(lora_A_ERD, roots_E * signs_E), by_value(lora_B_EFR, roots_E)


def factor_merge(
    lora_A_ERD: Tensor, lora_B_EFR: Tensor, weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Σ w A and Σ w B (LoraHub, arXiv 2307.13269; mttl's default for Arrow). To be multiplied with
    one scaling, theirs being the first expert's. Weights are squared where i = j, and experts are
    mixed where not: another function than Σ w ΔW, kept for comparison."""
    weights_E = torch.tensor(list(weights), dtype=torch.float64)
    return weighted_sum(lora_A_ERD, weights_E), weighted_sum(lora_B_EFR, weights_E)


def _by_dense_values(
    by_value: Combination,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    weights: Sequence[float],
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Combines E dense updates, all in memory at once, and factors the result."""
    updates_EFD = torch.stack([B @ A * s for A, B, s in zip(lora_A, lora_B, scalings, strict=True)])
    return factored(by_value(updates_EFD, torch.tensor(list(weights))), rank)


def _bias(
    modules: Sequence[AdapterModule],
    weights: Sequence[float],
    by_value: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    *,
    scaling: float | None = None,
) -> Tensor | None:
    """Of the biases with their scalings, or all with one; an expert without one has zeros."""
    if all(module.bias is None for module in modules):
        return None
    stack = [
        torch.zeros(module.lora_B.shape[0], dtype=dtype)
        if module.bias is None
        else module.bias.to(dtype) * (module.scaling if scaling is None else scaling)
        for module in modules
    ]
    return by_value(torch.stack(stack), torch.tensor(list(weights), dtype=torch.float64))


def _stacked(lora_A: Sequence[Tensor], where: str, method: str) -> Tensor:
    ranks = sorted({factor.shape[0] for factor in lora_A})
    if len(ranks) > 1:
        another = f"{method}_svd" if f"{method}_svd" in METHODS else "svd or cat"
        raise ConfigError(
            f"method={method!r} combines values of factors, which must be of one rank; {where} has "
            f"the ranks {', '.join(map(str, ranks))}. Use {another}."
        )
    return torch.stack(list(lora_A))

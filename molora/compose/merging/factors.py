"""Weighted sums of updates as one pair of factors, exact or of a smaller rank, and what is lost."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from molora.compose.lowrank import canonical_signs, low_rank_svd
from molora.io.peft_adapter import AdapterModule


def computing_type(modules: Sequence[AdapterModule]) -> torch.dtype:
    """The widest type of the factors, float32 at least."""
    types = [factor.dtype for module in modules for factor in (module.lora_A, module.lora_B)]
    return functools.reduce(torch.promote_types, types, torch.float32)


def concatenated(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], coefficients: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(A (ΣR, D), B (F, ΣR)) with B A = Σ_e c_e B_e A_e, exactly (package peft's `cat`).

    Args:
        lora_A: E times (R_e, D).
        lora_B: E times (F, R_e).
        coefficients: E numbers, weight · scaling; they go into B.
    """
    lora_B = [factor * float(c) for factor, c in zip(lora_B, coefficients, strict=True)]
    return torch.cat(list(lora_A)), torch.cat(lora_B, dim=1)


def truncated(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best B A of a rank, and the relative residual ‖difference‖ / ‖B A‖ (Frobenius norm).

    B takes the singular values, as in package peft. The SVD is computed in float64; the result is
    of the factors' type.
    """
    svd = low_rank_svd(lora_A, lora_B, dtype=torch.float64)
    rank = min(rank, lora_A.shape[1], lora_B.shape[0], svd.S.shape[-1])
    lost = _ratio(float(svd.S[rank:].norm()), float(svd.S.norm()))
    B = (svd.U[:, :rank] * svd.S[:rank]).to(lora_B.dtype)
    return svd.Vh[:rank].to(lora_A.dtype), B, lost


def factored(update_FD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a rank of a dense update, the singular values in B."""
    U, S, Vh = torch.linalg.svd(update_FD, full_matrices=False)
    U, Vh = canonical_signs(U, Vh)
    return Vh[:rank].contiguous(), U[:, :rank] * S[:rank]


def update_norm(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> float:
    """‖scaling · B A‖ in the Frobenius norm, computed in float64 without cancellation: from QR of
    the factors, or from the product where that is smaller."""
    a_RD, b_FR = lora_A.double(), lora_B.double()
    if a_RD.shape[0] >= min(a_RD.shape[1], b_FR.shape[0]):
        product = b_FR @ a_RD
    else:
        product = torch.linalg.qr(b_FR).R @ torch.linalg.qr(a_RD.mT).R.mT
    return abs(scaling) * float(product.norm())


def relative_residual(found: tuple[Tensor, Tensor], meant: tuple[Tensor, Tensor]) -> float:
    """‖B A − B' A'‖ / ‖B' A'‖ of two pairs of factors, A first, of any ranks."""
    (a, b), (a_meant, b_meant) = found, meant
    a_both = torch.cat([a.double(), a_meant.double()])
    b_both = torch.cat([b.double(), -b_meant.double()], dim=1)
    return _ratio(update_norm(a_both, b_both), update_norm(a_meant, b_meant))


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0

"""Singular values and inner products of updates scaling · B A, from the factors.

No (F, D) product is formed: with B = Q_B R_B and Aᵀ = Q_A R_A (QR of either), the SVD of the small
core R_B R_Aᵀ gives that of B A (exact; of order (F + D) R² operations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molora.io.peft_adapter import AdapterModule


@dataclass(frozen=True, eq=False)
class LowRankSVD:
    """scaling · B A = U diag(S) Vh.

    Attributes:
        U: (…, F, R), orthonormal columns.
        S: (…, R), from the largest; none is negative.
        Vh: (…, R, D), orthonormal rows. The component of largest magnitude of each is positive
            (the first of equal ones), so that equal factors give equal vectors.

    Where R exceeds min(F, D), what lies beyond is zero in all three. Where a singular value is
    zero or occurs twice, its vectors are one choice of many.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def low_rank_svd(
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | float = 1.0,
    *,
    dtype: torch.dtype | None = None,
) -> LowRankSVD:
    """The singular value decomposition of scaling · B A, for one update or many.

    Args:
        lora_A: (…, R, D).
        lora_B: (…, F, R).
        scaling: a number, or (…,).
        dtype: in which to compute; by default that of the factors, float32 at least.
    """
    dtype = dtype or torch.promote_types(
        torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32
    )
    rank = lora_A.shape[-2]
    q_A, r_A = torch.linalg.qr(lora_A.to(dtype).mT)
    q_B, r_B = torch.linalg.qr(lora_B.to(dtype))
    core_U, sigma, core_Vh = torch.linalg.svd(r_B @ r_A.mT, full_matrices=False)
    factor = torch.as_tensor(scaling, dtype=dtype, device=sigma.device)
    U, Vh = canonical_signs(q_B @ core_U, core_Vh @ q_A.mT)
    U = U * torch.where(factor < 0, -1.0, 1.0).to(dtype)[..., None, None]
    S = sigma * factor.abs()[..., None]
    return LowRankSVD(*_filled_up(U, S, Vh, rank))


def canonical_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of vectors (…, F, R), (…, R, D) with the component of largest magnitude of each right
    one made positive."""
    largest = Vh.abs().argmax(dim=-1, keepdim=True)
    sign = torch.where(Vh.gather(-1, largest) < 0, -1.0, 1.0).to(Vh.dtype)
    return U * sign.mT, Vh * sign


def _filled_up(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """With zeros up to `rank`, which may be larger than the matrix."""
    missing = rank - S.shape[-1]
    if not missing:
        return U, S, Vh
    pad = torch.nn.functional.pad
    return pad(U, (0, missing)), pad(S, (0, missing)), pad(Vh, (0, 0, 0, missing))


def prototype(svd: LowRankSVD) -> Tensor:
    """(…, D): the direction of inputs that the update answers with the largest outputs, of norm 1
    (Arrow, arXiv 2405.11157). Its sign means nothing. An update of zero has an arbitrary one."""
    return svd.Vh[..., 0, :]


def spectral_factor(svd: LowRankSVD) -> Tensor:
    """S · Vh (…, R, D), for which ‖factor x‖ = ‖scaling · B A x‖ (SpectR, arXiv 2504.03454; the
    scaling is in it, which the paper leaves open)."""
    return svd.S[..., None] * svd.Vh


def inner_products(
    modules: Sequence[AdapterModule], *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """(E, E): ⟨ΔW_i, ΔW_j⟩ = Σ (A_i A_jᵀ) ∘ (B_iᵀ B_j) · s_i s_j of one module's E updates, of any
    ranks. Computed in `dtype` from products of the size of the sum of all ranks. Biases and
    magnitudes (DoRA) are no part of it."""
    ranks = torch.tensor([module.rank for module in modules])
    a_RD = torch.cat([module.lora_A.to(dtype) for module in modules])
    b_FR = torch.cat([module.lora_B.to(dtype) * module.scaling for module in modules], dim=1)
    products_RR = (a_RD @ a_RD.mT) * (b_FR.mT @ b_FR)
    expert_R = torch.repeat_interleave(torch.arange(len(modules)), ranks).to(a_RD.device)
    rows_ER = products_RR.new_zeros(len(modules), len(products_RR))
    rows_ER.index_add_(0, expert_R, products_RR)
    return rows_ER.new_zeros(len(modules), len(modules)).index_add_(1, expert_R, rows_ER)

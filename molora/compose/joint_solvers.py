"""Alternating solvers for a basis that several updates share.

An update is (A (R, Q), B (P, R)), standing for B A, in float64. Weights are in B already.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from molora.compose.lowrank import low_rank_svd

Update = tuple[Tensor, Tensor]


def full_basis(
    updates: Sequence[Update], rank: int, *, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Orthonormal U (P, C), V (Q, C) that keep the most of Σ_e ‖Uᵀ M_e V‖².

    A step replaces U by an orthonormal basis of (Σ M V Vᵀ Mᵀ) U, then V likewise. As the sum is
    convex in either, no step makes it smaller.
    """
    rank = min(rank, updates[0][1].shape[0], updates[0][0].shape[1])
    left_PP = _total(b @ (a @ a.mT) @ b.mT for a, b in updates)
    right_QQ = _total(a.mT @ (b.mT @ b) @ a for a, b in updates)
    U, V = _leading(left_PP, rank), _leading(right_QQ, rank)
    whole = float(left_PP.trace())
    kept = 0.0
    for _ in range(iterations):
        turned = [(a @ V, b) for a, b in updates]  # M V = b (a V)
        U = torch.linalg.qr(_total(b @ (z @ (z.mT @ (b.mT @ U))) for z, b in turned)).Q
        turned = [(b.mT @ U, a) for a, b in updates]  # Mᵀ U = aᵀ (bᵀ U)
        V = torch.linalg.qr(_total(a.mT @ (z @ (z.mT @ (a @ V))) for z, a in turned)).Q
        now = sum(float((z.mT @ (a @ V)).square().sum()) for z, a in turned)
        if now - kept <= tolerance * whole:
            break
        kept = now
    return U, V


def _leading(gram: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Their sum, with one at a time in memory."""
    return functools.reduce(torch.add, parts)


def diagonal_basis(
    updates: Sequence[Update], rank: int, *, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """U (P, C), V (Q, C) of columns of norm 1 that leave the least of Σ_e ‖M_e − U diag(σ_e) Vᵀ‖².

    From two starts, of which the better end is taken: the leading vectors of the sum of all
    updates, which are good where experts resemble each other, and the leading pairs of vectors of
    each, which are good where they do not.
    """
    ends = []
    for U, V in (_of_the_sum(updates, rank), _of_each(updates, rank)):
        ends.append(_least_squares(updates, U, V, iterations, tolerance))
    _, U, V = min(ends, key=lambda end: end[0])
    return U, V


def diagonal_core(update: Update, U: Tensor, V: Tensor) -> Tensor:
    """(C,): the σ with the least ‖B A − U diag(σ) Vᵀ‖."""
    return _diagonal_cores([update], U, V)[0][0]


def _diagonal_cores(updates: Sequence[Update], U: Tensor, V: Tensor) -> tuple[Tensor, float]:
    """(the best σ (E, C), Σ_e ‖M_e‖² − ‖M_e − U diag(σ_e) Vᵀ‖²)."""
    inner_EC = torch.stack([((U.mT @ b) * (a @ V).mT).sum(1) for a, b in updates])
    sigma_EC = inner_EC @ torch.linalg.pinv((U.mT @ U) * (V.mT @ V), hermitian=True)
    return sigma_EC, float((inner_EC * sigma_EC).sum())


def _of_the_sum(updates: Sequence[Update], rank: int) -> tuple[Tensor, Tensor]:
    svd = low_rank_svd(torch.cat([a for a, _ in updates]), torch.cat([b for _, b in updates], 1))
    return svd.U[:, :rank], svd.Vh[:rank].mT


def _of_each(updates: Sequence[Update], rank: int) -> tuple[Tensor, Tensor]:
    parts = [low_rank_svd(a, b) for a, b in updates]
    order = torch.cat([part.S for part in parts]).argsort(descending=True, stable=True)[:rank]
    U = torch.cat([part.U for part in parts], dim=1)[:, order]
    return U, torch.cat([part.Vh for part in parts])[order].mT


def _least_squares(
    updates: Sequence[Update], U: Tensor, V: Tensor, iterations: int, tolerance: float
) -> tuple[float, Tensor, Tensor]:
    """(what is left, U, V) of alternating least squares."""
    whole = sum(float(((a @ a.mT) * (b.mT @ b)).sum()) for a, b in updates)
    sigma_EC, explained = _diagonal_cores(updates, U, V)
    for _ in range(iterations):
        inverse_CC = torch.linalg.pinv((sigma_EC.mT @ sigma_EC) * (V.mT @ V), hermitian=True)
        pairs = zip(updates, sigma_EC, strict=True)
        U = _unit(_total(b @ ((a @ V) * s) for (a, b), s in pairs) @ inverse_CC)
        sigma_EC, _ = _diagonal_cores(updates, U, V)
        inverse_CC = torch.linalg.pinv((sigma_EC.mT @ sigma_EC) * (U.mT @ U), hermitian=True)
        pairs = zip(updates, sigma_EC, strict=True)
        V = _unit(_total(a.mT @ ((b.mT @ U) * s) for (a, b), s in pairs) @ inverse_CC)
        before = explained
        sigma_EC, explained = _diagonal_cores(updates, U, V)
        if explained - before <= tolerance * whole:
            break
    return whole - explained, U, V


def _unit(columns: Tensor) -> Tensor:
    """Columns of norm 1; those of 0 stay."""
    norms = columns.norm(dim=0)
    return columns / torch.where(norms > 0, norms, torch.ones_like(norms))

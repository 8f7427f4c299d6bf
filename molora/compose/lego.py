"""LoRA-LEGO (arXiv 2409.16167): rank units of all experts, clustered; the centroids are the result.

A unit is a row of A with the column of B that belongs to it. Three things are ours, since the paper
leaves them open: √|scaling| goes into both halves first, as scalings differ between experts; a unit
and its negative are the same, since (−a)(−b) = ab, and cluster as one; and the two formulas of
reweighting follow the paper's description.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESTARTS = 4
"""Starts of the clustering, of which the best is taken."""
ITERATIONS = 100
"""Steps of one start at most."""


def lego(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    weights: Sequence[float],
    *,
    rank: int,
    seed: int,
    reweight_parameters: bool = True,
    reweight_output: bool = True,
) -> tuple[Tensor, Tensor]:
    """(A (k, D), B (F, k)) from k clusters of units, k the rank, or the units' number if smaller.

    Args:
        lora_A: E times (R_e, D); ranks may differ.
        lora_B: E times (F, R_e).
        scalings: E numbers.
        weights: E numbers; units are multiplied with √|E w s|, so that with weights of 1 / E equal
            experts give that expert.
        rank: k.
        seed: of the clustering's starts; the same gives the same.
        reweight_parameters: centroids get the mean norm of their units, which averaging shrinks.
        reweight_output: the update is multiplied with √(R / k), R the mean rank, since the
            variance of outputs grows with the number of units.
    """
    products = [len(lora_A) * w * s for w, s in zip(weights, scalings, strict=True)]
    a_ND = torch.cat([A.double() * abs(p) ** 0.5 for A, p in zip(lora_A, products, strict=True)])
    b_NF = torch.cat(
        [
            B.double().mT * (abs(p) ** 0.5 * (1 if p >= 0 else -1))
            for B, p in zip(lora_B, products, strict=True)
        ]
    )
    units_NP = torch.cat([a_ND, b_NF], dim=1)
    k = min(rank, len(units_NP))
    centroids_KP = clustered(units_NP, k, seed=seed, keep_norms=reweight_parameters)
    if reweight_output:
        centroids_KP = centroids_KP * (len(units_NP) / len(lora_A) / k) ** 0.25
    a_KD, b_KF = centroids_KP.split([a_ND.shape[1], b_NF.shape[1]], dim=1)
    return a_KD.to(lora_A[0].dtype).contiguous(), b_KF.mT.to(lora_B[0].dtype).contiguous()


def clustered(units_NP: Tensor, k: int, *, seed: int, keep_norms: bool) -> Tensor:
    """(k, P): centroids of k clusters by Lloyd's steps from k-means++ starts, signs of units free.

    Sorted from the largest norm, each with its largest component positive. With `keep_norms` a
    centroid is scaled to the mean norm of its units.
    """
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(units_NP, _spread(units_NP, k, generator)) for _ in range(RESTARTS)]
    _, label_N, centroids_KP = min(runs, key=lambda run: run[0])
    if keep_norms:
        norms_K = _means(units_NP.norm(dim=1, keepdim=True), label_N, k)
        lengths_K = centroids_KP.norm(dim=1, keepdim=True)
        ratio_K = torch.where(lengths_K > 0, norms_K / lengths_K, torch.ones_like(norms_K))
        centroids_KP = centroids_KP * ratio_K
    largest = centroids_KP.abs().argmax(dim=1, keepdim=True)
    positive_KP = torch.where(centroids_KP.gather(1, largest) < 0, -centroids_KP, centroids_KP)
    return positive_KP[positive_KP.norm(dim=1).argsort(descending=True, stable=True)]


def _spread(units_NP: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k units to start from, each drawn with the square of its distance from those before it."""
    first = int(torch.randint(len(units_NP), (), generator=generator))
    chosen = [first]
    distance_N = _distances(units_NP, units_NP[first : first + 1])[:, 0]
    while len(chosen) < k:
        odds_N = distance_N.clone()
        odds_N[chosen] = 0
        if not odds_N.any():  # only copies are left
            odds_N = torch.ones_like(odds_N)
            odds_N[chosen] = 0
        chosen.append(int(torch.multinomial(odds_N, 1, generator=generator)))
        new_N = _distances(units_NP, units_NP[chosen[-1] : chosen[-1] + 1])[:, 0]
        distance_N = torch.minimum(distance_N, new_N)
    return units_NP[chosen]


def _distances(units_NP: Tensor, centroids_KP: Tensor) -> Tensor:
    """(N, K): squares of the distances, of the two signs the smaller."""
    squares_NK = units_NP.square().sum(1)[:, None] + centroids_KP.square().sum(1)
    return (squares_NK - 2 * (units_NP @ centroids_KP.mT).abs()).clamp_min(0)


def _lloyd(units_NP: Tensor, centroids_KP: Tensor) -> tuple[float, Tensor, Tensor]:
    """(sum of squares, cluster of each unit, centroids)."""
    k = len(centroids_KP)
    label_N = torch.full((len(units_NP),), -1)
    for _ in range(ITERATIONS):
        distance_NK = _distances(units_NP, centroids_KP)
        new_N = _without_empty(distance_NK, distance_NK.argmin(dim=1))
        if torch.equal(new_N, label_N):
            break
        label_N = new_N
        dots_N = (units_NP * centroids_KP[label_N]).sum(1, keepdim=True)
        turned_NP = torch.where(dots_N < 0, -units_NP, units_NP)
        centroids_KP = _means(turned_NP, label_N, k)
    distance_N = _distances(units_NP, centroids_KP).gather(1, label_N[:, None])
    return float(distance_N.sum()), label_N, centroids_KP


def _without_empty(distance_NK: Tensor, label_N: Tensor) -> Tensor:
    """An empty cluster gets the unit that is farthest from its own, of those that are not alone."""
    counts_K = torch.bincount(label_N, minlength=distance_NK.shape[1])
    for empty in (counts_K == 0).nonzero()[:, 0].tolist():
        own_N = distance_NK.gather(1, label_N[:, None])[:, 0]
        moved = int(torch.where(counts_K[label_N] > 1, own_N, -1.0).argmax())
        counts_K[label_N[moved]] -= 1
        counts_K[empty] = 1
        label_N[moved] = empty
    return label_N


def _means(values_NP: Tensor, label_N: Tensor, k: int) -> Tensor:
    sums_KP = values_NP.new_zeros(k, values_NP.shape[1]).index_add_(0, label_N, values_NP)
    return sums_KP / torch.bincount(label_N, minlength=k)[:, None]

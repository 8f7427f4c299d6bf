"""LoRA-LEGO: clusters of rank units, against cases whose clusters are known and scipy's k-means."""

from __future__ import annotations

import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from molora.compose.lego import clustered, lego


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(found: tuple[Tensor, Tensor], expected: Tensor) -> float:
    return float((found[1] @ found[0] - expected).norm() / expected.norm())


def test_equal_experts_are_that_expert_whatever_the_signs_and_order_of_their_units() -> None:
    A, B = random(4, 9), random(7, 4, seed=1)
    signs = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    As, Bs = [A, A[order], A * signs[:, None]], [B, B[:, order], B * signs]
    merged = lego(As, Bs, [0.5] * 3, [1 / 3] * 3, rank=4, seed=0)
    assert apart(merged, 0.5 * B @ A) < 1e-12
    turned = lego(As, Bs, [0.5] * 3, [-1 / 3] * 3, rank=4, seed=0)
    assert apart(turned, -0.5 * B @ A) < 1e-12
    different = [A, random(4, 9, seed=2), A]
    assert apart(lego(different, Bs, [0.5] * 3, [1 / 3] * 3, rank=4, seed=0), 0.5 * B @ A) > 0.1


def test_scalings_are_folded_in_before_clustering() -> None:
    As = [random(r, 9, seed=r) for r in (2, 3, 5)]
    Bs = [random(7, r, seed=r + 9) for r in (2, 3, 5)]
    scalings, weights = [4.0, 0.25, -1.0], [0.5, 0.2, 0.3]
    found = lego(As, Bs, scalings, weights, rank=6, seed=3)
    folded = [A * abs(s) ** 0.5 for A, s in zip(As, scalings, strict=True)]
    with_sign = [
        B * abs(s) ** 0.5 * (1 if s > 0 else -1) for B, s in zip(Bs, scalings, strict=True)
    ]
    same = lego(folded, with_sign, [1.0] * 3, weights, rank=6, seed=3)
    assert (found[0].shape, found[1].shape) == ((6, 9), (7, 6))
    assert apart(found, same[1] @ same[0]) < 1e-12
    assert apart(lego(As, Bs, [1.0] * 3, weights, rank=6, seed=3), same[1] @ same[0]) > 0.1


def test_with_a_cluster_for_each_unit_only_the_output_is_reweighted() -> None:
    As, Bs = [random(2, 9), random(4, 9, seed=1)], [random(7, 2, seed=2), random(7, 4, seed=3)]
    total = 0.5 * (Bs[0] @ As[0] + Bs[1] @ As[1])
    found = lego(As, Bs, [1.0, 1.0], [0.5, 0.5], rank=99, seed=0)
    assert found[0].shape[0] == 6
    # the units carry E w = 1 each; √(R / k) with the mean rank of 3, and k = 6
    assert apart(found, 2 * total * (3 / 6) ** 0.5) < 1e-12
    plain = lego(As, Bs, [1.0, 1.0], [0.5, 0.5], rank=99, seed=0, reweight_output=False)
    assert apart(plain, 2 * total) < 1e-12


def planted(noise: float) -> tuple[Tensor, Tensor]:
    """Five centroids, and 40 units about them with random signs."""
    centroids = 3 * random(5, 12)
    units = centroids.repeat(8, 1) + noise * random(40, 12, seed=1)
    return centroids, units * random(40, 1, seed=2).sign()


def test_planted_clusters_are_found_and_averaging_does_not_shrink_them() -> None:
    centroids, units = planted(0.5)
    kept = clustered(units, 5, seed=0, keep_norms=True)
    plain = clustered(units, 5, seed=0, keep_norms=False)
    assert (kept.norm(dim=1).diff() <= 0).all()
    for centroid, members in zip(centroids, units.view(8, 5, 12).unbind(1), strict=True):
        signed = members * (members @ centroid).sign()[:, None]
        mean = signed.mean(0)
        mean = mean * mean[mean.abs().argmax()].sign()
        nearest = plain[(plain - mean).norm(dim=1).argmin()]
        assert torch.allclose(nearest, mean)
        reweighted = kept[(kept - mean).norm(dim=1).argmin()]
        assert reweighted.norm().item() == pytest.approx(members.norm(dim=1).mean().item())
        assert reweighted.norm() > mean.norm()


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_as_tight_as_scipys(seed: int) -> None:
    units = random(60, 8, seed=seed)
    units = units * units[:, :1].sign() + torch.tensor([9.0] + [0.0] * 7)  # signs play no part
    centroids, labels = kmeans2(units.numpy(), 6, minit="++", iter=100, rng=seed)
    theirs = float((units - torch.from_numpy(centroids)[labels]).square().sum())
    ours = clustered(units, 6, seed=seed, keep_norms=False)
    found = float(torch.cdist(units, ours).min(1).values.square().sum())
    assert found <= 1.05 * theirs


def test_the_same_seed_gives_the_same_and_copies_and_zeros_are_no_fault() -> None:
    _, units = planted(2.0)
    one = clustered(units, 7, seed=4, keep_norms=True)
    assert torch.equal(one, clustered(units, 7, seed=4, keep_norms=True))
    copies = torch.cat([units[:2].repeat(3, 1), torch.zeros(2, 12)])
    found = clustered(copies, 6, seed=0, keep_norms=True)
    assert found.shape == (6, 12)
    assert found.isfinite().all()
    distances = torch.cdist(torch.cat([copies, -copies]), found)
    assert (distances.min(1).values.view(2, -1).min(0).values < 1e-6).all()

"""How far apart tasks are routed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from molora.report.data import Layer, Utilisation


def jensen_shannon(distributions: Sequence[Sequence[float]]) -> float:
    """Jensen–Shannon divergence of n distributions with equal weights, to base n: in [0, 1].

    0: all the same; 1: no expert serves two of them. H(mean) − mean H; Lin 1991, IEEE Transactions
    on Information Theory 37.
    """
    n = len(distributions)
    if n < 2:
        return 0.0
    mean = [sum(column) / n for column in zip(*distributions, strict=True)]
    gap = _entropy(mean) - sum(map(_entropy, distributions)) / n
    return min(1.0, max(0.0, gap / math.log(n)))


def divergences(utilisation: Utilisation, layer: Layer) -> dict[str, float]:
    """Site of the layer → divergence of its loads between all tasks.

    Sites that did not see every task are left out.
    """
    by_task = [utilisation.sites_of(task, layer) for task in utilisation.tasks]
    return {
        site: jensen_shannon([_normalised(sites[site]) for sites in by_task])
        for site in (by_task[0] if by_task else {})
        if all(site in sites for sites in by_task)
    }


def pairwise(utilisation: Utilisation) -> list[list[float]]:
    """(tasks, tasks): divergence of two tasks, averaged over the sites that saw both."""
    tasks = utilisation.tasks
    matrix = [[0.0] * len(tasks) for _ in tasks]
    for (i, first), (j, second) in combinations(enumerate(tasks), 2):
        found = [
            jensen_shannon([_normalised(sites[site]), _normalised(others[site])])
            for layer in utilisation.layers
            for sites, others in [
                (utilisation.sites_of(first, layer), utilisation.sites_of(second, layer))
            ]
            for site in sites.keys() & others.keys()
        ]
        matrix[i][j] = matrix[j][i] = sum(found) / len(found) if found else math.nan
    return matrix


def _normalised(loads: Sequence[float]) -> list[float]:
    total = sum(loads)
    return [load / total for load in loads]


def _entropy(distribution: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in distribution if p > 0)

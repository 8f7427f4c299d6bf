"""From sums over a window to the numbers of a line of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from molora.routing.statistics import Sums
from molora.train.alarms import Alarm
from molora.train.gradients import NAMES, Norms
from molora.train.window import Layout, WindowSums


@dataclass(frozen=True)
class Report:
    """What was seen between two lines of metrics, on all ranks together."""

    step: int
    totals: dict[str, float]
    """For the logs of the Trainer, see `MetricsWriter`."""
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Site → its numbers, see `site_numbers`."""
    alarms: tuple[Alarm, ...] = ()
    """Raised by this window."""
    grad_norm: float | None = None
    """Of all roles together, where the gradients of the last step were measured."""


def site_numbers(
    sums_N: Tensor,
    by_rank: Tensor,
    losses: Mapping[str, float],
    norms: Mapping[str, float],
    absent: frozenset[int] = frozenset(),
) -> dict[str, Any]:
    """The numbers of one site; E counts the experts that can be chosen there.

    * ``load``: of each expert its share of the choices, times E: 1 is even, 0 is dead, E is all.
    * ``load_min``, ``load_max``, ``dead``: least and greatest load, and the experts without any, of
      those that can be chosen.
    * ``entropy``: of a row's scores, as a share of its maximum log E: 1 is undecided, 0 certain.
    * ``margin``: of the highest score over the second, both as shares of all scores.
    * ``balance``: E · Σ f_e P_e, f_e being expert e's share of the choices and P_e of the scores:
      1 at even routing, whatever losses the mixture has.
    * ``aux/NAME`` and ``weighted/NAME``: an auxiliary loss before its coefficient, and what it adds
      to the loss; where sites are pooled by layer or model, of the site's pool.
    * ``router_grad_norm``, ``expert_grad_norm``: see `GradientNorms`.
    * ``agreement``: of the ranks, if there are several: 1 − the largest total variation distance
      between one rank's loads and those of all, 1 if all are the same.

    Args:
        sums_N: (2E + 3,) of all ranks, see `row_sums`.
        by_rank: (ranks, 2E + 3) of each.
        losses: name → value.
        norms: role → norm.
        absent: experts that cannot be chosen.
    """
    sums = Sums(sums_N)
    choosable = [expert for expert in range(sums.num_experts) if expert not in absent]
    number, choices, rows = len(choosable), sums.counts.sum(), float(sums.rows)
    numbers: dict[str, Any] = {}
    if choices > 0:
        share_E = sums.counts / choices
        load = (share_E * number).tolist()
        possible = [load[expert] for expert in choosable]
        numbers |= {"load": load, "load_min": min(possible), "load_max": max(possible)}
        numbers["dead"] = [expert for expert in choosable if load[expert] == 0]
        numbers["balance"] = float(number * (share_E * sums.mass / rows).sum())
        if len(by_rank) > 1:
            numbers["agreement"] = _agreement(share_E, by_rank[:, : sums.num_experts])
    if rows > 0:
        numbers["entropy"] = float(sums.entropy) / math.log(max(number, 2))
        numbers["margin"] = float(sums.margin)
    named = {NAMES[role]: value for role, value in norms.items()}
    return {**numbers, **losses, **named}


def _agreement(share_E: Tensor, counts_WE: Tensor) -> float:
    counts_WE = counts_WE[counts_WE.sum(dim=1) > 0]
    distance_W = 0.5 * (counts_WE / counts_WE.sum(dim=1, keepdim=True) - share_E).abs().sum(dim=1)
    return 1 - float(distance_W.max())


def sites(
    layout: Layout,
    table_WN: Tensor,
    sums: WindowSums,
    norms: Norms,
    *,
    steps: int,
    factors: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """Site → `site_numbers`.

    Args:
        table_WN: every rank's vector of sums, on the CPU.
        sums: of all ranks.
        norms: of the step at the end of the window; empty if not measured.
        steps: optimiser steps in the window.
        factors: see `MetricsWindow`.
    """
    places = table_WN.split(layout.sizes, dim=1)[1:-1]
    found = {}
    for (site, sums_N), by_rank in zip(sums.sites.items(), places, strict=True):
        losses = {}
        for name, values in sums.losses.items() if sums.scalars["forwards"] else ():
            losses[f"aux/{name}"] = values[site] / steps
            losses[f"weighted/{name}"] = factors.get(name, 0.0) * values[site] / steps
        absent = layout.absent.get(site, frozenset())
        found[site] = site_numbers(sums_N, by_rank, losses, norms.sites.get(site, {}), absent)
    return found


def totals(
    layout: Layout,
    sums: WindowSums,
    sites: Mapping[str, Mapping[str, Any]],
    norms: Norms,
    steps: int,
) -> dict[str, float]:
    """What concerns the model as a whole, see `MetricsWriter`."""
    found: dict[str, float] = {}
    if sums.scalars["forwards"]:
        wanted = (name for name in layout.scalars if name.startswith("aux"))
        found = {name: sums.scalars[name] / steps for name in wanted}
    routed = [numbers for numbers in sites.values() if "load" in numbers]
    if routed:
        found["load_min"] = min(numbers["load_min"] for numbers in routed)
        found["load_max"] = max(numbers["load_max"] for numbers in routed)
        found["dead_experts"] = sum(len(numbers["dead"]) for numbers in routed)
        for name, place in (("entropy", "routing_entropy"), ("margin", "routing_margin")):
            found[place] = sum(numbers[name] for numbers in routed) / len(routed)
        if "agreement" in routed[0]:
            found["rank_agreement"] = min(numbers["agreement"] for numbers in routed)
    return found | {NAMES[role]: value for role, value in norms.roles.items()}

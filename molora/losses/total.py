"""The weighted sum of auxiliary losses over the sites of a model, made in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from molora.routing.record import Routing, concatenate

Term = Callable[[Routing, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class WeightedTerm:
    """A term and how it enters; see `molora.config.Loss`."""

    name: str
    term: Term
    coefficient: float
    scope: Literal["site", "layer", "model"]
    reduction: Literal["mean", "sum"]
    mask: Literal["valid", "all"]


@dataclass(frozen=True)
class AuxLosses:
    """What `total` computed."""

    weighted: Tensor
    """Scalar, in the graph: Σ coefficient · reduced term."""
    raw: Mapping[str, Tensor]
    """Name → reduced term before its coefficient, detached."""
    sites: tuple[str, ...] = ()
    """The sites that had records."""
    per_site: Mapping[str, Tensor] = field(default_factory=dict)
    """Name → (sites,) term of the pool that each site is in, detached."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Name → by which the term of a pool is multiplied before all are added."""


def total(
    records: Mapping[str, Sequence[Routing]],
    losses: Sequence[WeightedTerm],
    *,
    layer_of: Mapping[str, str],
    side: Mapping[str, Tensor],
) -> AuxLosses:
    """Σ coefficient · reduction over pools of term.

    Args:
        records: site → its records in this forward; several are pooled.
        losses: the terms. Scope "site" makes one pool per site, "layer" one per layer and width,
            "model" one per width.
        layer_of: site → layer.
        side: columns of the batch.
    """
    weighted = torch.zeros((), dtype=torch.float32)
    sites = tuple(site for site, site_records in records.items() if site_records)
    raw: dict[str, Tensor] = {}
    per_site: dict[str, Tensor] = {}
    factors: dict[str, float] = {}
    for loss in losses:
        pools = _pools(records, loss, layer_of)
        if not pools:
            continue
        values = [loss.term(pool, side) for _, pool in pools]
        values = [value.to(values[0].device) for value in values]
        stacked = torch.stack(values)
        reduced = stacked.mean() if loss.reduction == "mean" else stacked.sum()
        weighted = weighted.to(reduced.device) + loss.coefficient * reduced
        raw[loss.name] = reduced.detach()
        pool_of = {
            site: value
            for (members, _), value in zip(pools, values, strict=True)
            for site in members
        }
        per_site[loss.name] = torch.stack([pool_of[site].detach() for site in sites])
        factors[loss.name] = loss.coefficient / (len(pools) if loss.reduction == "mean" else 1)
    return AuxLosses(weighted, raw, sites, per_site, factors)


def _pools(
    records: Mapping[str, Sequence[Routing]], loss: WeightedTerm, layer_of: Mapping[str, str]
) -> list[tuple[set[str], Routing]]:
    """The sites of every pool, and the pool."""
    groups: dict[object, list[tuple[str, Routing]]] = {}
    for site, site_records in records.items():
        for record in site_records:
            kept = record if loss.mask == "valid" else replace(record, mask=None)
            # experts of different numbers cannot be pooled: such a layer or model has one pool per
            # width
            width = (record.num_experts, record.gates.shape[1])
            key = {"site": site, "layer": (layer_of[site], width), "model": width}[loss.scope]
            groups.setdefault(key, []).append((site, kept))
    return [
        ({site for site, _ in group}, concatenate([record for _, record in group]))
        for group in groups.values()
    ]

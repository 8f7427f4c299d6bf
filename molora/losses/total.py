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
    """Name → (sites,) term of each site, detached; for losses of scope "site" only."""


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
    raw: dict[str, Tensor] = {}
    per_site: dict[str, Tensor] = {}
    for loss in losses:
        values = [loss.term(pool, side) for pool in _pools(records, loss, layer_of)]
        if not values:
            continue
        stacked = torch.stack([value.to(values[0].device) for value in values])
        reduced = stacked.mean() if loss.reduction == "mean" else stacked.sum()
        weighted = weighted.to(reduced.device) + loss.coefficient * reduced
        raw[loss.name] = reduced.detach()
        if loss.scope == "site":
            per_site[loss.name] = stacked.detach()
    sites = tuple(site for site, site_records in records.items() if site_records)
    return AuxLosses(weighted, raw, sites, per_site)


def _pools(
    records: Mapping[str, Sequence[Routing]], loss: WeightedTerm, layer_of: Mapping[str, str]
) -> list[Routing]:
    groups: dict[object, list[Routing]] = {}
    for site, site_records in records.items():
        for record in site_records:
            kept = record if loss.mask == "valid" else replace(record, mask=None)
            # experts of different numbers cannot be pooled: such a layer or model has one pool per
            # width
            width = (record.num_experts, record.gates.shape[1])
            key = {"site": site, "layer": (layer_of[site], width), "model": width}[loss.scope]
            groups.setdefault(key, []).append(kept)
    return [concatenate(group) for group in groups.values()]

"""What happened between two lines of metrics, summed on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from molora.attach import Mixture
from molora.attach.losses import weighted_terms
from molora.errors import CheckpointError
from molora.losses import AuxLosses
from molora.routing.statistics import RoutingStatistics, accumulator


@dataclass(frozen=True)
class Layout:
    """The places of all sums of a window in one vector, the same on every rank."""

    experts: Mapping[str, int]
    """Site → number of experts."""
    losses: Sequence[str]
    """Names of the auxiliary losses."""
    absent: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Site → experts that cannot be chosen there; sites where all can are left out."""

    @classmethod
    def of(cls, mixture: Mixture) -> Layout:
        """The sites and losses of a mixture."""
        # not from tensors, which ZeRO-3 partitions
        planned = {place.path: place.num_experts for place in mixture.plan.placements}
        experts = {site: planned[path] for path, site in mixture.built.routed_by.items()}
        absent = {}
        for name, site in mixture.built.sites.items():
            present_E = getattr(site.router, "present", None)
            if present_E is not None:
                absent[name] = frozenset((~present_E).nonzero().flatten().tolist())
        return cls(experts, [term.name for term in weighted_terms(mixture.config)], absent)

    @property
    def scalars(self) -> list[str]:
        return ["tokens", "forwards", "aux_loss", *(f"aux/{name}" for name in self.losses)]

    @property
    def sizes(self) -> list[int]:
        return [
            len(self.scalars),
            *(2 * number + 3 for number in self.experts.values()),
            len(self.losses) * len(self.experts),
        ]


@dataclass(frozen=True)
class WindowSums:
    """A window's sums under their names; of one rank, or added up."""

    scalars: dict[str, float]
    sites: dict[str, Tensor]
    """Site → (2E + 3,), see `row_sums`."""
    losses: dict[str, dict[str, float]]
    """Loss → site → term of its pool."""

    @classmethod
    def read(cls, layout: Layout, vector: Tensor) -> WindowSums:
        """From a vector on the CPU."""
        scalars, *sites, losses = vector.split(layout.sizes)
        rows = losses.view(len(layout.losses), len(layout.experts)).tolist()
        return cls(
            dict(zip(layout.scalars, scalars.tolist(), strict=True)),
            dict(zip(layout.experts, sites, strict=True)),
            {
                name: dict(zip(layout.experts, row, strict=True))
                for name, row in zip(layout.losses, rows, strict=True)
            },
        )


class MetricsWindow:
    """Auxiliary losses, routing and tokens of the optimiser steps since the last line of metrics.

    All are sums over this rank's micro-batches; those of all ranks are added.

    Attributes:
        factors: loss → by which the term of a pool enters the loss.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.routing = RoutingStatistics()
        self.factors: dict[str, float] = {}
        self._scalars: dict[str, Tensor] = {}
        self._per_site: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self._started = time.perf_counter()

    def add_scalar(self, name: str, value: Tensor) -> None:
        """Add to a sum of `Layout.scalars`."""
        value = value.detach()
        known = self._scalars.get(name)
        value = value.to(accumulator(value.device))
        self._scalars[name] = value if known is None else known + value.to(known.device)

    def add_losses(self, aux: AuxLosses, weight: Tensor | float) -> None:
        """Add the auxiliary losses of one forward, times its share of an optimiser step."""
        self.factors.update(aux.factors)
        self.add_scalar("forwards", torch.ones_like(aux.weighted.detach()))
        self.add_scalar("aux_loss", weight * aux.weighted)
        for name, value in aux.raw.items():
            self.add_scalar(f"aux/{name}", weight * value)
        for name, values_S in aux.per_site.items():
            self._add_per_site((name, aux.sites), weight * values_S)

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self._started += seconds

    def seconds(self) -> float:
        """Training time since the window opened."""
        return time.perf_counter() - self._started

    def vector(self, device: torch.device | None = None) -> Tensor:
        """All sums at their places, without synchronisation; by default on the device they are on.

        float64, or float32 on devices without it.
        """
        sums = self.routing.sums()
        kept = [*self._scalars.values(), *sums.values(), torch.zeros(0)]
        device = kept[0].device if device is None else device
        none = torch.zeros(max(self.layout.sizes), dtype=accumulator(device), device=device)
        parts = [self._scalars.get(name, none[0]).reshape(1) for name in self.layout.scalars]
        for site, number in self.layout.experts.items():
            parts.append(sums.get(site, none[: 2 * number + 3]))
        for name in self.layout.losses:
            values = dict(self._site_losses(name))
            parts += [values.get(site, none[0]).reshape(1) for site in self.layout.experts]
        return torch.cat([part.to(device) for part in parts])

    def add_vector(self, vector: Tensor) -> None:
        """Add what another window's `vector` returned.

        Raises:
            CheckpointError: it is of a mixture of other sites or losses.
        """
        if vector.numel() != sum(self.layout.sizes):
            raise CheckpointError(
                f"the open line of metrics in the checkpoint has {vector.numel()} sums, but this "
                f"mixture has {sum(self.layout.sizes)}: it has other sites, experts or losses. "
                "Resume with the same mixture."
            )
        scalars, *sites, losses = vector.split(self.layout.sizes)
        for name, value in zip(self.layout.scalars, scalars, strict=True):
            self.add_scalar(name, value)
        self.routing.add(dict(zip(self.layout.experts, sites, strict=True)))
        names = tuple(self.layout.experts)
        rows = losses.view(len(self.layout.losses), len(names))
        for loss, values_S in zip(self.layout.losses, rows, strict=True):
            self._add_per_site((loss, names), values_S)

    def _add_per_site(self, key: tuple[str, tuple[str, ...]], values_S: Tensor) -> None:
        known_S = self._per_site.get(key)
        values_S = values_S.to(accumulator(values_S.device))
        self._per_site[key] = values_S if known_S is None else known_S + values_S.to(known_S.device)

    def _site_losses(self, name: str) -> Iterator[tuple[str, Tensor]]:
        found: dict[str, Tensor] = {}
        for (loss, sites), values_S in self._per_site.items():
            for site, value in zip(sites, values_S, strict=True) if loss == name else ():
                found[site] = found[site] + value if site in found else value
        yield from found.items()

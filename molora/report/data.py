"""What a report is made of: plain values, so that a figure can be drawn again without a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layer:
    """A row of the heat map: the layer of one stack of the model."""

    stack: str
    """Module path of the stack, such as `model.layers`; or of a site outside of layers."""
    index: int
    """Position in the stack, from 0."""


@dataclass(frozen=True)
class Curve:
    """One number over the steps of one run; NaN where it was not finite."""

    name: str
    """Its key in the metrics, such as `loss` or `aux_loss`."""
    steps: tuple[int, ...]
    """Optimiser steps, ascending."""
    values: tuple[float, ...]
    """One per step."""
    run: str = ""
    """Which run, if several are drawn together."""

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"curve {self.name!r} has {len(self.steps)} steps and {len(self.values)} values; "
                "give one value per step."
            )


@dataclass(frozen=True)
class TaskScore:
    """How one model did on the held-out rows of one task."""

    task: str
    model: str
    accuracy: float | None
    """Share of right answers, 0 to 1; None where the task has none."""
    loss: float | None
    """Mean negative log-likelihood per supervised token, in nats; None if not measured."""
    rows: int
    """Held-out rows scored."""


@dataclass(frozen=True)
class Utilisation:
    """task → site → share of the choices that fell on each expert.

    Raises:
        ValueError: a site whose number of experts differs between tasks, a load that is negative or
            not finite.
    """

    loads: Mapping[str, Mapping[str, tuple[float, ...]]]

    def __post_init__(self) -> None:
        widths: dict[str, int] = {}
        for task, sites in self.loads.items():
            for site, loads in sites.items():
                if widths.setdefault(site, len(loads)) != len(loads):
                    raise ValueError(
                        f"site {site!r} has {len(loads)} experts on task {task!r} and "
                        f"{widths[site]} on another. Loads of different mixtures do not go into "
                        "one report."
                    )
                if not all(math.isfinite(load) and load >= 0 for load in loads):
                    raise ValueError(f"loads of site {site!r} on task {task!r} are {loads}.")

    @classmethod
    def from_loads(cls, loads: Mapping[str, Mapping[str, Any]]) -> Utilisation:
        """From `RoutingStatistics.loads()` of each task: tensors or sequences of floats."""
        return cls(
            {
                task: {
                    site: tuple(float(load) for load in _listed(values))
                    for site, values in sites.items()
                }
                for task, sites in loads.items()
            }
        )

    @property
    def tasks(self) -> list[str]:
        """In the order given, without those that no site counted."""
        return [task for task, sites in self.loads.items() if sites]

    @property
    def layers(self) -> list[Layer]:
        """Rows of the heat map: stacks in order of appearance, layers by number."""
        found = dict.fromkeys(layer_of(site) for sites in self.loads.values() for site in sites)
        stacks = list(dict.fromkeys(layer.stack for layer in found))
        return sorted(found, key=lambda layer: (stacks.index(layer.stack), layer.index))

    @property
    def num_experts(self) -> int:
        """Of the site that has most."""
        return max((len(v) for sites in self.loads.values() for v in sites.values()), default=0)

    def sites_of(self, task: str, layer: Layer) -> dict[str, tuple[float, ...]]:
        """Site → load ÷ uniform load of each expert, for the sites of one layer.

        A site that saw no token of the task is left out.
        """
        return {
            site: tuple(load * len(loads) / sum(loads) for load in loads)
            for site, loads in self.loads[task].items()
            if layer_of(site) == layer and sum(loads) > 0
        }

    def average(self, task: str, layer: Layer) -> tuple[float, ...]:
        """Load ÷ uniform load of each expert, averaged over those sites of the layer that have it;
        empty without one."""
        sites = self.sites_of(task, layer).values()
        width = max(map(len, sites), default=0)
        columns = [[loads[e] for loads in sites if e < len(loads)] for e in range(width)]
        return tuple(sum(column) / len(column) for column in columns)

    def peak(self, task: str, layer: Layer) -> float | None:
        """The greatest load ÷ uniform load of any expert at any site of the layer."""
        sites = self.sites_of(task, layer).values()
        return max((max(loads) for loads in sites), default=None)


def layer_of(site: str) -> Layer:
    """`model.layers.3.mlp.up_proj` → (`model.layers`, 3); a site outside of layers is its own."""
    found = re.fullmatch(r"(.+?)\.(\d+)(?:\..*)?", site)
    return Layer(found[1], int(found[2])) if found else Layer(site, 0)


@dataclass(frozen=True)
class Report:
    """Everything on one page; what is empty is left out."""

    title: str
    scores: Sequence[TaskScore] = ()
    """Models appear in this order; differences are to the first, usually the base."""
    curves: Sequence[Curve] = ()
    utilisation: Utilisation | None = None
    configuration: str = ""
    """The resolved configuration as text."""
    notes: Sequence[str] = ()
    """Sentences a reader needs: what was compared, what was not."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else to state, such as trainable parameters, base model, time: label → text."""


def _listed(values: Any) -> Iterable[float]:
    """One transfer from the device, not one per expert."""
    listed: Iterable[float] = values.tolist() if hasattr(values, "tolist") else values
    return listed

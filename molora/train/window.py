"""What happened between two lines of metrics, summed on the device and read with one
synchronisation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from molora.routing.statistics import RoutingStatistics


class MetricsWindow:
    """Auxiliary losses, loads and tokens of the optimiser steps since the last line of metrics."""

    def __init__(self) -> None:
        self.loads = RoutingStatistics()
        self._scalars: dict[str, Tensor] = {}
        self._started = time.perf_counter()

    def add_scalar(self, name: str, value: Tensor) -> None:
        """Add to a sum over the window."""
        value = value.detach().float()
        known = self._scalars.get(name)
        self._scalars[name] = value if known is None else known + value.to(known.device)

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self._started += seconds

    def seconds(self) -> float:
        """Training time since the window opened."""
        return time.perf_counter() - self._started

    def read(
        self, *, average: Callable[[Tensor], Tensor], device: Any
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Sums by name, and rows by expert for every site, averaged over the processes.

        Args:
            average: mean over the processes, in which all take part.
            device: where the processes exchange tensors.
        """
        counted = self.loads.counts()
        parts = [*(value.reshape(1) for value in self._scalars.values()), *counted.values()]
        if not parts:
            return {}, {}
        flat = iter(average(torch.cat([part.to(device) for part in parts])).tolist())
        sums = {name: next(flat) for name in self._scalars}
        counts = {
            site: [next(flat) for _ in range(len(counts_E))] for site, counts_E in counted.items()
        }
        return sums, counts


def load_summary(counts: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Least and greatest load of any expert of any site, and the number of experts without any.

    A load is an expert's share of its site's choices times the number of experts: 1 is even, 0 is
    dead, E is everything.
    """
    loads = [
        count * len(site) / sum(site) for site in counts.values() if sum(site) for count in site
    ]
    if not loads:
        return {}
    return {
        "load_min": min(loads),
        "load_max": max(loads),
        "dead_experts": sum(load == 0 for load in loads),
    }

"""Alarms in words: experts that get nothing, and sites that send everything to the same experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molora.errors import CheckpointError
from molora.routing.statistics import Sums

COLLAPSED_SHARE = 0.95
"""A site has collapsed when its busiest experts have this share of what they could have at most."""


@dataclass(frozen=True)
class Alarm:
    """Something that happened at one site."""

    step: int
    site: str
    event: Literal["dead", "collapsed", "recovered"]
    experts: tuple[int, ...]
    steps: int
    """For how many optimiser steps, as of the last line of metrics."""
    message: str


@dataclass
class _Site:
    """What is remembered of one site; counts are over all ranks."""

    idle: Tensor
    """(E,) steps without a row."""
    reported: Tensor
    """(E,) 1 if that was said."""
    streak: Tensor
    """(2E + 3,) sums since the site looked collapsed."""
    collapsed: Tensor
    """(2,) steps that it looked so, and 1 if that was said."""

    @classmethod
    def new(cls, num_experts: int) -> _Site:
        return cls(*(torch.zeros(n, dtype=torch.float64) for n in cls.sizes(num_experts)))

    @staticmethod
    def sizes(num_experts: int) -> list[int]:
        return [num_experts, num_experts, 2 * num_experts + 3, 2]

    def parts(self) -> list[Tensor]:
        return [self.idle, self.reported, self.streak, self.collapsed]


class RoutingAlarms:
    """Raised once per event and once when it is over, after `steps` optimiser steps in a row.

    * An expert is dead when no row chose it, on any rank.
    * A site has collapsed when its choice no longer depends on the row: with k choices per row, the
      k busiest experts have at least `COLLAPSED_SHARE` of all that k experts can have; where all
      experts act on every row, one has that share of the scores. Judged by every window, and by all
      rows since it began: a window of one row always looks collapsed.

    Steps are counted in windows between two lines of metrics, so an alarm is up to one window late.

    Args:
        num_experts: site → number of experts.
        steps: how long; None for no alarms.
    """

    def __init__(self, num_experts: Mapping[str, int], *, steps: int | None) -> None:
        self.steps = steps
        self._sites = {site: _Site.new(number) for site, number in num_experts.items()}

    def update(self, sums: Mapping[str, Tensor], *, step: int, steps: int) -> list[Alarm]:
        """The alarms of one window.

        Args:
            sums: site → (2E + 3,) over the window and all ranks, see `row_sums`.
            step: at the end of the window.
            steps: in the window.
        """
        if self.steps is None:
            return []
        alarms: list[Alarm] = []
        for name, site in self._sites.items():
            if name in sums and float(Sums(sums[name]).rows) > 0:
                alarms += self._collapsed(name, site, sums[name], step=step, steps=steps)
                alarms += self._dead(name, site, sums[name], step=step, steps=steps)
        return alarms

    def _collapsed(
        self, name: str, site: _Site, sums_N: Tensor, *, step: int, steps: int
    ) -> list[Alarm]:
        assert self.steps is not None
        since_N = site.streak + sums_N
        if min(concentration(sums_N)[0], concentration(since_N)[0]) < COLLAPSED_SHARE:
            lasted, reported = int(site.collapsed[0]), bool(site.collapsed[1])
            site.streak.zero_()
            site.collapsed.zero_()
            message = f"{name}: choices depend on the token again, after {lasted} steps of collapse"
            return [Alarm(step, name, "recovered", (), lasted, message)] if reported else []
        site.streak.copy_(since_N)
        site.collapsed[0] += steps
        lasted = int(site.collapsed[0])
        if bool(site.collapsed[1]) or lasted < self.steps:
            return []
        site.collapsed[1] = 1
        share, experts = concentration(since_N)
        what = "scores" if Sums(since_N).every_expert_acts else "choices"
        message = (
            f"{name}: collapsed, {_experts(experts)} took {share:.0%} of the {what} for "
            f"{lasted} steps"
        )
        return [Alarm(step, name, "collapsed", experts, lasted, message)]

    def _dead(
        self, name: str, site: _Site, sums_N: Tensor, *, step: int, steps: int
    ) -> list[Alarm]:
        alive_E = Sums(sums_N).counts > 0
        lasted = int((site.idle * site.reported * alive_E).max())
        back = _numbers(site.reported.bool() & alive_E)
        site.idle.add_(steps).masked_fill_(alive_E, 0)
        site.reported.masked_fill_(alive_E, 0)
        new_E = (site.idle >= (self.steps or 0)) & ~site.reported.bool()
        alarms = []
        if back:
            message = f"{name}: {_experts(back)} got tokens again, after {lasted} steps without"
            alarms.append(Alarm(step, name, "recovered", back, lasted, message))
        if bool(new_E.any()):
            site.reported.masked_fill_(new_E, 1)
            dead, lasted = _numbers(new_E), int(site.idle[new_E].min())
            message = f"{name}: {_experts(dead)} got no token for {lasted} steps"
            alarms.append(Alarm(step, name, "dead", dead, lasted, message))
        return alarms

    # ------------------------------------------------------------------ state

    def state(self) -> Tensor:
        """Everything that is remembered, as one float64 vector; equal on all ranks."""
        parts = [part for site in self._sites.values() for part in site.parts()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: it is of a mixture of other sites or experts.
        """
        sizes = [part.numel() for site in self._sites.values() for part in site.parts()]
        if state.numel() != sum(sizes):
            raise CheckpointError(
                f"the alarms in the checkpoint have {state.numel()} numbers, but this mixture has "
                f"{sum(sizes)}: it has other sites or experts. Resume with the same mixture."
            )
        values = iter(state.split(sizes))
        for site in self._sites.values():
            for part in site.parts():
                part.copy_(next(values))


def concentration(sums_N: Tensor) -> tuple[float, tuple[int, ...]]:
    """How much the busiest experts have of what they could have, and which these are."""
    sums = Sums(sums_N)
    if sums.every_expert_acts:
        share, expert = (sums.mass / sums.mass.sum()).max(dim=0)
        return float(share), (int(expert),)
    choices, rows = float(sums.counts.sum()), float(sums.rows)
    k = max(1, round(choices / max(rows, 1)))
    busiest = sums.counts.topk(k)
    return float(busiest.values.sum()) / max(1.0, min(choices, k * rows)), tuple(
        sorted(busiest.indices.tolist())
    )


def _numbers(chosen_E: Tensor) -> tuple[int, ...]:
    return tuple(chosen_E.nonzero().flatten().tolist())


def _experts(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"expert {numbers[0]}"
    return f"experts {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"

"""Alarms in words: experts that get nothing, and sites that send everything to the same experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molora.errors import CheckpointError

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
    """What is remembered of one site, over all ranks; numbers, since tensors so small are slow."""

    idle: list[float]
    """(E,) steps without a row."""
    reported: list[float]
    """(E,) 1 if that was said."""
    streak: list[float]
    """(2E + 3,) sums since the site looked collapsed."""
    collapsed: list[float]
    """(2,) steps that it looked so, and 1 if that was said."""

    @classmethod
    def new(cls, num_experts: int) -> _Site:
        return cls.of([0.0] * (4 * num_experts + 5))

    @classmethod
    def of(cls, numbers: list[float]) -> _Site:
        number = (len(numbers) - 5) // 4
        return cls(
            numbers[:number], numbers[number : 2 * number], numbers[2 * number : -2], numbers[-2:]
        )

    def numbers(self) -> list[float]:
        return [*self.idle, *self.reported, *self.streak, *self.collapsed]


class RoutingAlarms:
    """Raised once per event and once when it is over, after `steps` optimiser steps in a row.

    * An expert is dead when no row chose it, on any rank, though it can be chosen there.
    * A site has collapsed when its choice no longer depends on the row: with k choices per row, the
      k busiest experts have at least `COLLAPSED_SHARE` of all that k experts can have; where all
      experts act on every row, one has that share of the scores. Judged by every window, and by all
      rows since it began: a window of one row always looks collapsed. Where a row chooses all that
      can be chosen, nothing collapses.

    Steps are counted in windows between two lines of metrics, so an alarm is up to one window late.

    Args:
        num_experts: site → number of experts.
        steps: how long; None for no alarms.
        absent: site → experts that cannot be chosen there.
    """

    def __init__(
        self,
        num_experts: Mapping[str, int],
        *,
        steps: int | None,
        absent: Mapping[str, frozenset[int]] | None = None,
    ) -> None:
        self.steps = steps
        self._absent = absent or {}
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
            window = sums[name].tolist() if name in sums else None
            if window is not None and _Window(window).rows > 0:
                if not self._chooses_all(name, window):
                    alarms += self._collapsed(name, site, window, step=step, steps=steps)
                alarms += self._dead(name, site, window, step=step, steps=steps)
        return alarms

    def _chooses_all(self, name: str, sums: list[float]) -> bool:
        """Whether rows choose all experts of a site where some cannot be chosen."""
        absent, window = self._absent.get(name), _Window(sums)
        if not absent:
            return False
        return window.choices > (len(window.counts) - len(absent) - 0.5) * window.rows

    def _collapsed(
        self, name: str, site: _Site, window: list[float], *, step: int, steps: int
    ) -> list[Alarm]:
        assert self.steps is not None
        since = [old + new for old, new in zip(site.streak, window, strict=True)]
        share, experts = concentration(since)
        if min(concentration(window)[0], share) < COLLAPSED_SHARE:
            lasted, reported = int(site.collapsed[0]), bool(site.collapsed[1])
            site.streak, site.collapsed = [0.0] * len(window), [0.0, 0.0]
            message = f"{name}: choices depend on the token again, after {lasted} steps of collapse"
            return [Alarm(step, name, "recovered", (), lasted, message)] if reported else []
        lasted, reported = int(site.collapsed[0]) + steps, bool(site.collapsed[1])
        is_new = not reported and lasted >= self.steps
        site.streak, site.collapsed = since, [lasted, float(reported or is_new)]
        if not is_new:
            return []
        what = "scores" if _Window(since).every_expert_acts else "choices"
        message = (
            f"{name}: collapsed, {_experts(experts)} took {share:.0%} of the {what} for "
            f"{lasted} steps"
        )
        return [Alarm(step, name, "collapsed", experts, lasted, message)]

    def _dead(
        self, name: str, site: _Site, window: list[float], *, step: int, steps: int
    ) -> list[Alarm]:
        assert self.steps is not None
        alarms, counts = [], _Window(window).counts
        back = tuple(e for e, count in enumerate(counts) if count and site.reported[e])
        if back:
            lasted = int(max(site.idle[e] for e in back))
            message = f"{name}: {_experts(back)} got tokens again, after {lasted} steps without"
            alarms.append(Alarm(step, name, "recovered", back, lasted, message))
        site.idle = [
            0.0 if count else idle + steps for count, idle in zip(counts, site.idle, strict=True)
        ]
        site.reported = [
            float(idle and told) for idle, told in zip(site.idle, site.reported, strict=True)
        ]
        idle = enumerate(zip(site.idle, site.reported, strict=True))
        long = [e for e, (lasted, told) in idle if lasted >= self.steps and not told]
        dead = tuple(e for e in long if e not in self._absent.get(name, ()))
        if dead:
            site.reported = [float(told or e in dead) for e, told in enumerate(site.reported)]
            lasted = int(min(site.idle[e] for e in dead))
            message = f"{name}: {_experts(dead)} got no token for {lasted} steps"
            alarms.append(Alarm(step, name, "dead", dead, lasted, message))
        return alarms

    # ------------------------------------------------------------------ state

    def state(self) -> Tensor:
        """Everything that is remembered, as one float64 vector; equal on all ranks."""
        numbers = [number for site in self._sites.values() for number in site.numbers()]
        return torch.tensor(numbers, dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: it is of a mixture of other sites or experts.
        """
        sizes = {name: len(site.numbers()) for name, site in self._sites.items()}
        if state.numel() != sum(sizes.values()):
            raise CheckpointError(
                f"the alarms in the checkpoint have {state.numel()} numbers, but this mixture has "
                f"{sum(sizes.values())}: it has other sites or experts. Resume with the same "
                "mixture."
            )
        numbers = iter(state.tolist())
        for name, size in sizes.items():
            self._sites[name] = _Site.of([next(numbers) for _ in range(size)])


class _Window:
    """Names for the parts of a site's sums as numbers, see `row_sums`."""

    def __init__(self, sums: list[float]) -> None:
        number = (len(sums) - 3) // 2
        self.counts, self.mass = sums[:number], sums[number : 2 * number]
        self.rows = sums[2 * number]
        self.choices = sum(self.counts)

    @property
    def every_expert_acts(self) -> bool:
        """Whether all experts act on all rows, or nearly."""
        return self.choices > (len(self.counts) - 0.5) * self.rows


def concentration(sums: list[float]) -> tuple[float, tuple[int, ...]]:
    """How much the busiest experts have of what they could have, and which these are."""
    window = _Window(sums)
    if window.every_expert_acts:
        share = max(window.mass) / sum(window.mass)
        return share, (window.mass.index(max(window.mass)),)
    k = max(1, round(window.choices / max(window.rows, 1)))
    busiest = sorted(range(len(window.counts)), key=lambda e: -window.counts[e])[:k]
    attainable = max(1.0, min(window.choices, k * window.rows))
    return sum(window.counts[e] for e in busiest) / attainable, tuple(sorted(busiest))


def _experts(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"expert {numbers[0]}"
    return f"experts {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"

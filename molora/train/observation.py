"""What a training run watches of its mixture, and what of it goes into a line of metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from molora.attach import Mixture
from molora.attach.hooks import DeferredAux
from molora.attach.side_inputs import share
from molora.routing.statistics import Sums, accumulator
from molora.train import summary
from molora.train.alarms import RoutingAlarms
from molora.train.gradients import GradientNorms, Norms
from molora.train.summary import Report
from molora.train.throughput import TokenFlops, device_peak_flops, memory_mib
from molora.train.window import Layout, MetricsWindow, WindowSums

DEAD_STEPS = 200
SHOWN_ALARMS = 8
_logger = logging.getLogger(__name__)


class Observation:
    """The open window of metrics of one run, its totals and its alarms.

    Everything stays on the device until `read`, which waits for it once.

    Attributes:
        tokens: number trained on, padding not counted, as of the last line.
        listeners: called with the `Report` of every line, on the first rank.

    Args:
        mixture: the mixture.
        dead_steps: optimiser steps after which `RoutingAlarms` are raised; None for none.
    """

    def __init__(self, mixture: Mixture, *, dead_steps: int | None = DEAD_STEPS) -> None:
        self.mixture = mixture
        self.listeners: list[Callable[[Report], None]] = []
        self._layout = Layout.of(mixture)
        self._dead_steps = dead_steps
        self._flops = TokenFlops(mixture)
        self.reset()

    def reset(self) -> None:
        """Forget everything: a run begins."""
        self._window = MetricsWindow(self._layout)
        self._gradients = GradientNorms(self.mixture)
        self._alarms = RoutingAlarms(
            self._layout.experts, steps=self._dead_steps, absent=self._layout.absent
        )
        self.tokens = self._logged_step = 0

    # ------------------------------------------------------------------ while it trains

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, forwards of the model are those of training."""
        with self.mixture.statistics(self._window.routing):
            yield

    def add_micro_batch(
        self,
        inputs: Mapping[str, Any],
        deferred: DeferredAux,
        *,
        num_items_in_batch: Tensor | int | None,
        scale: float,
        device: torch.device,
    ) -> None:
        """Add the auxiliary losses and tokens of one micro-batch, without synchronisation.

        Args:
            inputs: the batch.
            deferred: auxiliary losses of its forwards.
            num_items_in_batch: supervised tokens of the whole batch, over all ranks.
            scale: with this factor the losses of all micro-batches and ranks add up to one of an
                optimiser step.
            device: where to add.
        """
        for aux, supervised in deferred.forwards:
            self._window.add_losses(aux, share(num_items_in_batch, supervised) * scale)
        self._window.add_scalar("tokens", _tokens(inputs, device))

    def measure_gradients(self, *, step: int, device: torch.device) -> None:
        """Between the backward pass and optimiser step `step`, if a line of metrics follows it."""
        self._gradients.measure(step=step, device=device)

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self._window.pause(seconds)

    def seconds(self) -> float:
        """Training time since the window opened."""
        return self._window.seconds()

    # ------------------------------------------------------------------ a line of metrics

    def read(self, *, step: int, accelerator: Any, grad_norm: float | None = None) -> Report:
        """What was seen since the last line; the next window opens.

        Collective: one gather over the ranks, one copy to the host.

        Args:
            step: optimiser steps made.
            accelerator: Accelerate's, for the ranks.
            grad_norm: norm of the whole gradient of this step before clipping.
        """
        window, self._window = self._window, MetricsWindow(self._layout)
        table_WN, squares, memory = self._gather(window, step, accelerator)
        sums = WindowSums.read(self._layout, table_WN.sum(dim=0))
        steps, self._logged_step = max(1, step - self._logged_step), step
        norms = Norms({}, {})
        if squares is not None:
            norms = self._gradients.norms(squares.tolist(), total=grad_norm)
        sites = summary.sites(
            self._layout, table_WN, sums, norms, steps=steps, factors=window.factors
        )
        tokens = round(sums.scalars["tokens"])
        self.tokens += tokens
        per_second = tokens / window.seconds()
        return Report(
            step,
            {
                **summary.totals(self._layout, sums, sites, norms, steps),
                "tokens": self.tokens,
                "tokens_per_second": per_second,
                **self._utilisation(sums, per_second / len(table_WN)),
                "memory_mib": memory,
            },
            sites,
            tuple(self._alarms.update(sums.sites, step=step, steps=steps)),
            math.hypot(*norms.roles.values()) if norms.roles else None,
        )

    def publish(self, report: Report) -> None:
        """Give a report to the listeners, and say its alarms in words; on one rank."""
        shown = [alarm.message for alarm in report.alarms[:SHOWN_ALARMS]]
        if more := len(report.alarms) - len(shown):
            shown.append(f"and {more} more alarms, of other sites")
        for message in shown:
            _logger.warning("step %d: %s", report.step, message)
        for listener in self.listeners:
            listener(report)

    def _gather(
        self, window: MetricsWindow, step: int, accelerator: Any
    ) -> tuple[Tensor, Tensor | None, float]:
        """Sums by rank (W, N), squares of gradients (P,) if measured, most MiB of a rank."""
        device, gradients = accelerator.device, self._gradients
        memory = torch.tensor([memory_mib()], dtype=accumulator(device))
        parts = [window.vector(device), memory.to(device, non_blocking=True)]
        measured = gradients.squares is not None and gradients.step == step
        if measured:
            assert gradients.squares is not None
            parts.append(gradients.squares)
        vector_N = torch.cat(parts)
        table_WN = accelerator.gather(vector_N[None]).cpu().double()
        size = sum(self._layout.sizes)
        squares_WP = table_WN[:, size + 1 :]
        squares_P = squares_WP.sum(dim=0) if gradients.shared else squares_WP[0]
        memory_mib_max = float(table_WN[:, size].max())
        return table_WN[:, :size], squares_P if measured else None, memory_mib_max

    def _utilisation(self, sums: WindowSums, tokens_per_second: float) -> dict[str, float]:
        peak = device_peak_flops()
        if peak is None or not self._flops.known:
            return {}
        acting = {
            site: float(Sums(sums_N).counts.sum() / (Sums(sums_N).rows * number).clamp_min(1))
            for (site, sums_N), number in zip(
                sums.sites.items(), self._layout.experts.values(), strict=True
            )
        }
        return {"mfu": self._flops.per_token(acting) * tokens_per_second / peak}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """The open window of this rank, and totals and alarms, which are equal on all ranks."""
        totals = [self.tokens, self._logged_step, self.seconds()]
        return {
            "sums": self._window.vector().cpu(),
            "totals": torch.tensor(totals, dtype=torch.float64),
            "alarms": self._alarms.state(),
        }

    def load_state_dict(
        self,
        states: Sequence[Mapping[str, Tensor]],
        *,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        """Go on where a run was; the lines to come are those that it would have written.

        Every rank takes its own window. If there were more or fewer ranks, the first takes the sum
        of all: what a line says is a sum over ranks, but for `rank_agreement`.

        Args:
            states: what `state_dict` returned on every rank, in their order.
            rank: this one's number now.
            world_size: number of ranks now.
            device: where to add further.

        Raises:
            CheckpointError: they are of another mixture.
        """
        tokens, logged_step, seconds = states[0]["totals"].tolist()
        self.tokens, self._logged_step = int(tokens), int(logged_step)
        self._alarms.load(states[0]["alarms"])
        self._window = MetricsWindow(self._layout)
        self._window.pause(-seconds)
        alike = len(states) == world_size
        for number, state in enumerate(states):
            if number == rank if alike else rank == 0:
                self._window.add_vector(state["sums"].to(device))


def _tokens(inputs: Mapping[str, Any], device: torch.device) -> Tensor:
    """Number of positions of a batch that are not padding."""
    for name in ("segment_ids", "attention_mask"):
        if isinstance(inputs.get(name), Tensor):
            return (inputs[name] != 0).sum().to(device)
    ids = inputs.get("input_ids")
    # filled there: a copy of a host's number would wait for the device
    return torch.full((), 0 if ids is None else ids.numel(), dtype=torch.int64, device=device)

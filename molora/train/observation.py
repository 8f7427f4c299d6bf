"""What a training run watches of its mixture, and what of it goes into a line of metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from molora.attach import Mixture
from molora.attach.hooks import DeferredAux
from molora.attach.side_inputs import share
from molora.train.window import MetricsWindow, load_summary


class Observation:
    """The open window of metrics of one run, and its totals.

    Attributes:
        tokens: number trained on, padding not counted, as of the last line.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.reset()

    def reset(self) -> None:
        """Forget everything: a run begins."""
        self._window = MetricsWindow()
        self.tokens = self._logged_step = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, forwards of the model are those of training."""
        with self.mixture.statistics(self._window.loads):
            yield

    def add_micro_batch(
        self,
        inputs: Mapping[str, Any],
        deferred: DeferredAux,
        *,
        num_items_in_batch: Tensor | int | None,
        scale: float,
        device: Any,
    ) -> None:
        """Add the auxiliary losses and tokens of one micro-batch, without synchronisation.

        Args:
            inputs: the batch.
            deferred: auxiliary losses of its forwards.
            num_items_in_batch: supervised tokens of the whole batch.
            scale: by which a loss has to be multiplied to be one of an optimiser step.
            device: where to add.
        """
        for aux, supervised in deferred.forwards:
            weight = share(num_items_in_batch, supervised) * scale
            self._window.add_scalar("aux_loss", weight * aux.weighted)
            for name, value in aux.raw.items():
                self._window.add_scalar(f"aux/{name}", weight * value)
        self._window.add_scalar("tokens", _tokens(inputs).to(device))

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self._window.pause(seconds)

    def seconds(self) -> float:
        """Training time since the window opened."""
        return self._window.seconds()

    def read(self, *, step: int, accelerator: Any) -> dict[str, float]:
        """What a line of metrics gets at `step`; the next window opens."""
        window, self._window = self._window, MetricsWindow()
        sums, counts = window.read(
            average=lambda flat: accelerator.reduce(flat, reduction="mean"),
            device=accelerator.device,
        )
        steps = max(1, step - self._logged_step)
        self._logged_step = step
        tokens = round(sums.pop("tokens", 0.0) * accelerator.num_processes)
        self.tokens += tokens
        return {
            **{name: value / steps for name, value in sums.items()},
            **load_summary(counts),
            "tokens": self.tokens,
            "tokens_per_second": tokens / window.seconds(),
        }


def _tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Number of positions of a batch that are not padding."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.sum()
    ids = inputs.get("input_ids")
    return torch.tensor(0 if ids is None else ids.numel())

"""An evaluation loss that depends on the model and the rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molora.attach.side_inputs import ArgumentReader
from molora.routing.statistics import accumulator
from molora.train.filling import without_repeated


class TokenMean:
    """Mean loss over the supervised tokens of all batches of all ranks.

    The Trainers' own is a mean over rows of the mean of a row's batch: it changes with the batch
    size, and rows that fill up the last batches of several processes count twice.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, loss: Tensor, count: Tensor) -> None:
        """The mean loss of a batch, and of how many tokens."""
        # a mean over none is not a number
        total = torch.where(count > 0, loss.detach() * count, 0.0)
        sums = torch.stack([total, count]).to(accumulator(total.device))
        self._sums = sums if self._sums is None else self._sums + sums

    def mean(self, accelerator: Any) -> float | None:
        """Over all ranks, all of which call it; None if nothing was added."""
        if self._sums is None:
            return None
        total, count = accelerator.reduce(self._sums, "sum").tolist()
        return float(total / count) if count else float("nan")


def counted(
    inputs: Mapping[str, Any], arguments: ArgumentReader, *, accelerator: Any
) -> tuple[dict[str, Any], Tensor] | None:
    """A batch without labels on rows that only fill it up, and the number of labels that count.

    None where that number is not what the loss is a mean over: without labels, or of a regression.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    found = without_repeated(inputs, accelerator)
    count = arguments.supervised((), found)
    assert count is not None
    return found, count

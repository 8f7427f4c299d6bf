"""Token lists as padded batches, and a model that is only asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of `rows` in batches of about equal length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1: no padding), both int64 (B, S); rows end at the right edge."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return _tensor(ids, width, device), _tensor(mask, width, device)


def right_padded(
    rows: Sequence[Sequence[int]], pad: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1: no padding), both int64 (B, S); rows begin at the left edge."""
    width = max(map(len, rows))
    ids = [list(row) + [pad] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return _tensor(ids, width, device), _tensor(mask, width, device)


def _tensor(rows: list[list[int]], width: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=device).reshape(len(rows), width)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout, noise or gradient; afterwards every module is in its mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

"""The same sequences as an ordinary batch, as packed rows, and in one row with positions alone."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tiny_models import sequences
from torch import Tensor

from molora.data import Collator, pack
from molora.data.packing import best_fit

# windows of 8 positions end inside of sequences; bins of 18 hold 11 + 3 + 4, 5 + 12, and 9
LENGTHS = (11, 5, 9, 3, 12, 4)
WIDTH = 18


def rows() -> Dataset:
    """Every token has a label."""
    ids = [row.tolist() for row in sequences(LENGTHS)]
    types = [n % 2 for n in range(len(ids))]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "task_types": types})


def ordinary() -> dict[str, Tensor]:
    """A batch with one sequence per row."""
    return Collator(0)(list(rows()))


def packed(side: Any = "right") -> dict[str, Tensor]:
    """The same sequences, two or three to a row."""
    batch = Collator(0, padding_side=side)(list(pack(rows(), WIDTH)))
    assert batch["input_ids"].shape[0] == 3
    assert 0 < (batch["segment_ids"] == 0).sum() < 12
    return batch


def by_positions() -> dict[str, Tensor]:
    """The same sequences in one row, as a padding-free collator has them."""
    ids = sequences(LENGTHS)
    return {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat([torch.cat([torch.tensor([-100]), row[1:]]) for row in ids])[None],
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "task_types": rows().with_format("torch")["task_types"][:],
    }


def order_of_packed() -> list[int]:
    """Which sequence of `rows` is the first, second, … of `packed`."""
    return [number for members in best_fit(LENGTHS, WIDTH) for number in members]

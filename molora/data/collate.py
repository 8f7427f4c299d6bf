"""Examples of unequal length as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.data.mask import IGNORED
from molora.errors import DataError

SIDE_COLUMNS = ("task_ids", "task_types")


@dataclass(frozen=True)
class Collator:
    """Pads a list of examples to the longest and stacks their side columns.

    The attention mask comes from the lengths, never from token ids: with pad = eos, a mask by id
    would hide every stop token.

    Returns, for B examples of up to S tokens: ``input_ids``, ``labels`` (-100 on padding) and
    ``attention_mask``, each int64 (B, S), and ``task_ids`` and ``task_types``, int64 (B,), where
    the examples have them.

    Raises:
        DataError: when only some examples have a side column.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int = 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        columns = {
            "input_ids": (self.pad_token_id, [e["input_ids"] for e in examples]),
            "labels": (IGNORED, [e["labels"] for e in examples]),
            "attention_mask": (0, [[1] * len(e["input_ids"]) for e in examples]),
        }
        batch = {name: self._padded(rows, fill, width) for name, (fill, rows) in columns.items()}
        for name in SIDE_COLUMNS:
            present = [name in example for example in examples]
            if all(present):
                batch[name] = torch.tensor([int(e[name]) for e in examples])
            elif any(present):
                raise DataError(
                    f"`{name}` is in {sum(present)} of {len(present)} examples of a batch. "
                    "Give it to every row, or to none."
                )
        return batch

    def _padded(self, rows: Sequence[Sequence[int]], fill: int, width: int) -> Tensor:
        padded = torch.full((len(rows), width), fill)
        for number, row in enumerate(rows):
            place = slice(0, len(row)) if self.padding_side == "right" else slice(-len(row), None)
            padded[number, place] = torch.as_tensor(row)
        return padded


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token, or else its eos: as masks go by length, any token will do."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None else tokenizer.eos_token_id

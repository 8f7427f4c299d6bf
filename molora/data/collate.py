"""Examples of unequal length as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.config.data import SIDE_COLUMNS
from molora.data.mask import IGNORED
from molora.errors import DataError

Examples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Collator:
    """Pads a list of examples to the longest and stacks their side columns.

    The attention mask comes from the lengths, never from token ids: with pad = eos, a mask by id
    would hide every stop token. The first token of a sequence has no label: padding or another
    sequence would have to predict it.

    Returns, for B examples of up to S tokens: ``input_ids``, ``labels`` (-100 on padding) and
    ``attention_mask``, each int64 (B, S), and the side columns (``task_ids``, ``task_types`` …),
    int64 (B,), where the examples have them.

    For packed examples (see :func:`pack`), ``position_ids`` and ``segment_ids`` take the place of
    the attention mask, both int64 (B, S). Positions restart at 0 with every sequence and with the
    padding, from which transformers makes attention block-diagonal. Segments count a row's
    sequences from 1 and are 0 on padding. Side columns hold one value for each of the batch's G
    sequences, int64 (G,), in order.

    Raises:
        DataError: when only some examples are packed or have a side column.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int = 1

    def __call__(self, examples: Examples) -> dict[str, Tensor]:
        packed = _packed(examples)
        rows = {
            name: [torch.cat([torch.as_tensor(s) for s in e[name]]) for e in examples]
            if packed
            else [torch.as_tensor(e[name]) for e in examples]
            for name in ("input_ids", "labels")
        }
        longest = max(len(row) for row in rows["input_ids"])
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": self._padded(rows["input_ids"], self.pad_token_id, width),
            "labels": self._padded(rows["labels"], IGNORED, width),
        }
        if packed:
            batch |= self._segments(examples, width)
            firsts = batch["position_ids"] == 0
        else:
            ones = [torch.ones_like(row) for row in rows["input_ids"]]
            mask = batch["attention_mask"] = self._padded(ones, 0, width)
            firsts = mask.cumsum(dim=1) * mask == 1
        batch["labels"][firsts] = IGNORED
        return batch | side_columns(examples, packed=packed)

    def _segments(self, examples: Examples, width: int) -> dict[str, Tensor]:
        segments, positions = [], []
        for example in examples:
            lengths = torch.tensor([len(sequence) for sequence in example["input_ids"]])
            total = int(lengths.sum())
            segments.append(torch.arange(1, len(lengths) + 1).repeat_interleave(lengths))
            begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            parts = [torch.arange(total) - begins, torch.arange(width - total)]
            positions.append(torch.cat(parts if self.padding_side == "right" else parts[::-1]))
        return {
            "position_ids": torch.stack(positions),
            "segment_ids": self._padded(segments, 0, width),
        }

    def _padded(self, rows: Sequence[Tensor], fill: int, width: int) -> Tensor:
        padded = torch.full((len(rows), width), fill)
        for number, row in enumerate(rows):
            place = slice(0, len(row)) if self.padding_side == "right" else slice(-len(row), None)
            padded[number, place] = row
        return padded


def side_columns(examples: Examples, *, packed: bool = False) -> dict[str, Tensor]:
    """The side columns that the examples have: int64 (B,), or (G,) for G packed sequences.

    Raises:
        DataError: when only some examples have one.
    """
    columns = {}
    for name in SIDE_COLUMNS:
        if in_all(name, examples):
            values = [e[name] for e in examples]
            flat = [int(v) for of_row in values for v in of_row] if packed else map(int, values)
            columns[name] = torch.tensor(list(flat))
    return columns


def in_all(name: str, examples: Examples) -> bool:
    """Whether the examples have a column.

    Raises:
        DataError: when only some have it.
    """
    present = [name in example for example in examples]
    if any(present) and not all(present):
        raise DataError(
            f"`{name}` is in {sum(present)} of {len(present)} examples of a batch. "
            "Give it to every row, or to none."
        )
    return all(present)


def _packed(examples: Examples) -> bool:
    nested = [torch.as_tensor(example["input_ids"][0]).dim() > 0 for example in examples]
    if any(nested) and not all(nested):
        raise DataError(
            f"{sum(nested)} of {len(nested)} examples of a batch are packed. Pack all or none."
        )
    return all(nested)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token, or else its eos: as masks go by length, any token will do."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None else tokenizer.eos_token_id

"""Batches of unequal rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from molora.data import Collator, padding_id
from molora.errors import DataError

EOS = 2
LONG = {"input_ids": [5, 6, 7, EOS], "labels": [-100, 6, 7, EOS]}
SHORT = {"input_ids": [8, EOS], "labels": [-100, EOS]}


@pytest.mark.parametrize(
    ("side", "ids", "labels", "mask"),
    [
        ("right", [8, EOS, EOS, EOS], [-100, EOS, -100, -100], [1, 1, 0, 0]),
        ("left", [EOS, EOS, 8, EOS], [-100, -100, -100, EOS], [0, 0, 1, 1]),
    ],
)
def test_padding_by_length_keeps_the_eos_that_is_the_padding_token(side, ids, labels, mask):
    batch = Collator(pad_token_id=EOS, padding_side=side)([LONG, SHORT])
    assert batch["input_ids"].tolist() == [LONG["input_ids"], ids]
    assert batch["labels"].tolist() == [LONG["labels"], labels]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], mask]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    by_id = (batch["input_ids"] != EOS).long()
    assert not torch.equal(by_id, batch["attention_mask"])


def test_side_columns_are_stacked():
    examples = [{**LONG, "task_ids": 3, "task_types": 0}, {**SHORT, "task_ids": 1, "task_types": 1}]
    batch = Collator(pad_token_id=0)(examples)
    assert batch["task_ids"].tolist() == [3, 1]
    assert batch["task_types"].tolist() == [0, 1]
    assert batch["task_ids"].dtype == torch.int64
    assert set(Collator(pad_token_id=0)([LONG])) == {"input_ids", "labels", "attention_mask"}


def test_side_column_of_some_examples_is_refused():
    with pytest.raises(DataError, match=r"`task_ids` is in 1 of 2 examples of a batch"):
        Collator(pad_token_id=0)([{**LONG, "task_ids": 3}, SHORT])


def test_width_can_be_a_multiple():
    batch = Collator(pad_token_id=0, pad_to_multiple_of=8)([LONG, SHORT])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum().item() == 6


def test_padding_id_falls_back_on_eos(plain_tokenizer: Any, tokenizer_with: Any):
    own = tokenizer_with(None, "</s>", "bytes", "<eos>")
    assert padding_id(own) == own.pad_token_id != own.eos_token_id
    without = plain_tokenizer.__class__(
        tokenizer_object=plain_tokenizer.backend_tokenizer, eos_token="</s>"
    )
    assert without.pad_token_id is None
    assert padding_id(without) == without.eos_token_id


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_first_token_of_a_row_has_no_label(side: Any):
    """On the left there is padding that would have to predict it; and GPT-2's labels are counted
    before they are shifted."""
    whole = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [8, 9])]
    labels = Collator(pad_token_id=0, padding_side=side)(whole)["labels"].tolist()
    assert labels[0] == [-100, 6, 7]
    assert labels[1] == ([-100, 9, -100] if side == "right" else [-100, -100, 9])

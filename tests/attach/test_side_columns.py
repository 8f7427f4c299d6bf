"""Columns of the batch reach the modules of the mixture, and not the base model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor

import molora
from molora.config.data import SIDE_COLUMNS
from molora.data import Collator


@pytest.mark.parametrize("name", SIDE_COLUMNS)
def test_a_column_reaches_every_adapted_module(name: str) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    mixture = molora.attach(model, molora.presets.mola(num_experts=3, rank=2, dropout=0.0))
    randomize(mixture)
    values = torch.arange(len(batch["input_ids"]))
    seen: list[dict[str, Tensor]] = []

    def look(module: Any, inputs: Any) -> None:
        seen.append(dict(mixture._context.side.columns))

    paths = list(mixture.built.banks)
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(look)
    plain = model(**batch).logits
    assert seen == [{}] * len(paths)
    seen.clear()

    assert torch.equal(model(**batch, **{name: values}).logits, plain)

    assert len(seen) == len(paths) > 1
    assert all(list(columns) == [name] for columns in seen)
    assert all(torch.equal(columns[name], values) for columns in seen)
    with mixture.context(**{name: values + 1}):
        model(**batch)
    assert torch.equal(seen[-1][name], values + 1)
    assert model(**batch).logits is not None
    assert seen[-1] == {}


def test_the_collator_hands_on_the_same_columns() -> None:
    numbers = {name: place for place, name in enumerate(SIDE_COLUMNS)}
    example = {"input_ids": [3, 4], "labels": [3, 4], **numbers}
    batch = Collator(pad_token_id=0)([example, example])
    assert {name: batch[name].tolist() for name in SIDE_COLUMNS} == {
        name: [place] * 2 for name, place in numbers.items()
    }

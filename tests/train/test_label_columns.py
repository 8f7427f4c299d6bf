"""The columns that auxiliary losses read are there, with values that mean something to them."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

import molora
from molora.config import MixtureConfig
from molora.data import Tokenized
from molora.data.tokenized import Counts
from molora.errors import DataError
from molora.presets.frozen import recipe
from molora.train.objectives import check_columns


def composed(kind: str) -> MixtureConfig:
    names = ("math", "code", "law")
    _, fields = recipe(names, kind)
    losses = fields.pop("losses")
    experts = [{"name": name, "modules": {"q_proj": [3, 1.0]}} for name in names]
    form = {"kind": "imported", "experts": experts}
    group = {"targets": ["q_proj"], "num_experts": 3, "expert": form, **fields}
    return MixtureConfig.parse({"method": kind, "groups": [group], "losses": losses})


def rows(**columns: list[int]) -> Tokenized:
    data: dict[str, Any] = {"input_ids": [[3, 4]] * 3, "labels": [[3, 4]] * 3, **columns}
    counts = Counts()
    return Tokenized(Dataset.from_dict(data), counts, None, None, (), (), ())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no column `expert_labels`.*0 to 2, the numbers of the experts, one for"),
        ({"expert_labels": [0, 3, 1]}, r"values \[3\].*use 0 to 2, the numbers"),
        ({"task_types": [0, 1, 1]}, "no column `expert_labels`"),
    ],
)
def test_labels_are_numbers_of_experts(given: dict[str, list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_columns(composed("moa"), rows(**given))
    check_columns(composed("moa"), rows(expert_labels=[0, 2, 2]))
    check_columns(composed("meteora"), rows())


def test_types_are_two() -> None:
    config = molora.presets.loramoe()
    with pytest.raises(DataError, match=r"values \[2\].*use 0 and 1"):
        check_columns(config, rows(task_types=[0, 1, 2]))
    check_columns(config, rows(task_types=[0, 1, 1]))

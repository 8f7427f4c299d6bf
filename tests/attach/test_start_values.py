"""The values of a saved mixture in one that is attached already: a stage after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, tiny

import molora
from molora.attach.saving import load_values
from molora.config import MixtureConfig

GROUP = {"num_experts": 3, "rank": 5, "select": {"kind": "top_k", "k": 2}}


def config(*, losses: Any = (), **group: Any) -> MixtureConfig:
    return MixtureConfig.parse({"groups": [{**GROUP, **group}], "losses": losses})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    mixture = molora.attach(tiny("llama"), config(losses=[{}]))
    randomize(mixture)
    mixture.save(tmp_path / "first")
    return tmp_path / "first"


def test_values_are_taken_over_whatever_training_settings_differ(saved: Path) -> None:
    expected = molora.load(tiny("llama"), saved)
    model = tiny("llama")
    expert = {"kind": "lora", "init": "gaussian", "dropout": {"p": 0.2}}
    mixture = molora.attach(model, config(expert=expert, router={"jitter": 0.1}), seed=7)
    load_values(mixture, saved)
    assert mixture.config.losses == ()
    batch = batch_for(model)
    assert torch.equal(model(**batch).logits, expected.model(**batch).logits)
    with mixture.disabled():
        assert (model(**batch).logits - expected.model(**batch).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"expert": {"kind": "lora", "alpha": 8.0}}, r"expert\.alpha is 16\.0 there and 8\.0 here"),
        ({"select": {"kind": "top_k", "k": 1, "renormalize": False}}, r"select\.k"),
        ({"router": {"temperature": 2.0}}, r"router\.temperature is 1\.0 there and 2\.0 here"),
        ({"rank": 4}, r"groups\.0\.rank"),
        ({"targets": ["q_proj"]}, r"targets"),
        ({"expert": {"kind": "shared_a"}}, r"kind is 'lora' there and 'shared_a' here"),
    ],
)
def test_experts_or_routers_that_compute_something_else_are_refused(
    saved: Path, other: dict[str, Any], message: str
) -> None:
    mixture = molora.attach(tiny("llama"), config(**other))
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    with pytest.raises(molora.CheckpointError, match=message):
        load_values(mixture, saved)
    assert all(torch.equal(t, before[name]) for name, t in mixture.state_dict().items())


def test_another_base_is_refused(saved: Path) -> None:
    mixture = molora.attach(tiny("llama", seed=1), config())
    with pytest.raises(molora.CheckpointError, match="other values than this model's"):
        load_values(mixture, saved)

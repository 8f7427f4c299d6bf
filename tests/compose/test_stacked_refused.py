"""Where experts of a base's stacked weights cannot act, it is said, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import load_set, logits
from stacked_sets import (
    BOTH,
    DOWN,
    RAGGED,
    SAME,
    UP,
    compose,
)
from tiny_models import batch_for, tiny

import molora
from molora.compose.edit import edited
from molora.compose.experts import FrozenExperts
from molora.compose.gate_vectors import mean_activations
from molora.compose.xlora import export_xlora
from molora.errors import AttachError, ConfigError


@pytest.mark.parametrize("router", ["arrow", "spectr", "lag", "mole", "phatgoose"])
def test_routers_that_compare_updates_are_refused(tmp_path: Path, router: str) -> None:
    model = tiny("mixtral")
    names = {name for name, _ in model.named_modules()}
    with pytest.raises(ConfigError, match=r"gate_up_proj holds one update for each of 4 weights"):
        molora.compose(model, load_set(tmp_path, SAME, "mixtral"), router=router)
    assert {name for name, _ in model.named_modules()} == names


def test_a_mixture_stays_where_its_new_router_is_refused(tmp_path: Path) -> None:
    mixture = compose("mixtral", load_set(tmp_path, SAME, "mixtral"), "uniform")
    expected = logits(mixture.model)
    with pytest.raises(ConfigError, match="compares a linear's input"):
        edited(mixture, router="arrow")
    assert torch.equal(logits(mixture.model), expected)
    settings = mixture.config.model_dump()
    settings["groups"][0]["router"] = {"kind": "projection"}
    mixture.detach()
    with pytest.raises(ConfigError, match="compares a linear's input"):
        molora.attach(mixture.model, molora.MixtureConfig.parse(settings))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "trained": ({"trainable": ["math"], "router": "linear"}, "math adapts .*gate_up_proj, stacked"),
    "new on no linear": ({"new": ["next"], "router": "linear"}, "next would go on linears"),
    "start from directions": (
        {"router": {"kind": "linear", "vectors": "arrow"}},
        "vectors='arrow': experts adapt",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_act_on_stacked_weights_is_refused(tmp_path: Path, kind: str) -> None:
    options, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message):
        molora.compose(tiny("mixtral"), load_set(tmp_path, SAME, "mixtral"), **options)


def test_new_experts_on_linears_train_beside_frozen_ones_of_stacked_weights(tmp_path: Path) -> None:
    experts = load_set(tmp_path, RAGGED, "mixtral")
    mixture = compose("mixtral", experts, "linear", new=["next"], missing="zero")
    mixture.model.train()
    mixture.model(**batch_for(mixture.model)).loss.backward()
    trained = mixture.trainable_parameters()["experts"]
    assert trained
    assert all(p.grad is not None for p in trained)
    assert not any(
        UP in n or DOWN in n for n, p in mixture.named_parameters() if p.grad is not None
    )


def test_other_bases_are_refused_and_left_as_they_were(tmp_path: Path) -> None:
    experts = load_set(tmp_path, SAME, "mixtral")
    cases = {
        "4 stacked weights of .*gate_up_proj, which has the shape": tiny(
            "mixtral", num_local_experts=6
        ),
        "maps 32 to 80 features at .*gate_up_proj, which maps 32 to 96": tiny(
            "mixtral", intermediate_size=48
        ),
        "gate_up_proj, stacked weights that this model has not": tiny("llama"),
    }
    for message, model in cases.items():
        expected = logits(model)
        with pytest.raises(AttachError, match=message):
            molora.compose(model, experts, router="uniform")
        assert torch.equal(logits(model), expected)


def test_adapters_of_a_base_s_own_router_are_refused(tmp_path: Path) -> None:
    settings = {"math": {**BOTH, "target_parameters": ["gate.weight", UP]}}
    with pytest.raises(AttachError, match=r"gate\.weight, a parameter of a MixtralTopKRouter"):
        compose("mixtral", load_set(tmp_path, settings, "mixtral"), "uniform")


def test_what_is_made_from_linears_alone_refuses_stacked_weights(tmp_path: Path) -> None:
    experts = load_set(tmp_path, SAME, "mixtral")
    mixture = compose("mixtral", experts, "xlora", missing="zero")
    with pytest.raises(ConfigError, match="math has stacked weights of the base, which package"):
        export_xlora(mixture, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mixture.detach()
    with pytest.raises(ConfigError, match=r"math adapts .*gate_up_proj, stacked weights, for"):
        mean_activations(mixture.model, experts, {"math": [batch_for(mixture.model)]})


def test_a_stack_of_another_size_in_one_expert_is_refused(tmp_path: Path) -> None:
    experts = load_set(tmp_path, SAME, "mixtral")
    six = {
        path: replace(
            part,
            lora_A=torch.cat([part.lora_A, part.lora_A[:2]]),
            lora_B=torch.cat([part.lora_B, part.lora_B[:2]]),
        )
        for path, part in experts.adapters["math"].parameters.items()
    }
    odd = replace(experts.adapters["math"], parameters=six)
    mixed = FrozenExperts({**experts.adapters, "math": odd}, ())
    with pytest.raises(AttachError, match=r"lora_A of shape \(6, 3, 32\) .* is 4 stacked"):
        compose("mixtral", mixed, "uniform")

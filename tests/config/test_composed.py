"""Configurations of imported experts survive JSON and YAML, and cannot contradict themselves."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import yaml

from molora.config import MixtureConfig
from molora.errors import ConfigError
from molora.presets.frozen import ROUTERS, recipe

NAMES = ("math", "code", "law")
PATHS = ("model.layers.0.q_proj", "model.layers.0.v_proj")


def config(given: Any, **group: Any) -> dict[str, Any]:
    kind, fields = recipe(NAMES, given)
    losses = fields.pop("losses", [])
    experts = [
        {
            "name": name,
            "modules": {path: [3 + number, 1.5] for path in PATHS[: 1 + number % 2]},
            "sha256": f"{number:064x}",
            "invocation_tokens": [5, 6] if name == "law" else None,
        }
        for number, name in enumerate(NAMES)
    ]
    form = {"kind": "imported", "experts": experts}
    whole = {"targets": PATHS, "num_experts": 3, "expert": form, **fields, **group}
    return {"method": kind, "groups": [whole], "losses": losses}


GIVEN: dict[str, Any] = {
    **{kind: kind for kind in ROUTERS},
    "fixed": {"kind": "fixed", "weights": {"math": 0.5, "code": -1.0, "law": 0}},
    "meteora": {"kind": "meteora", "label_loss": 50.0},
    "lag": {"kind": "lag", "preselect": 2, "relative": True},
}


@pytest.mark.parametrize("kind", GIVEN)
def test_every_router_survives_json_and_yaml(kind: str) -> None:
    parsed = MixtureConfig.parse(config(GIVEN[kind]))
    data = parsed.model_dump(mode="json")
    assert MixtureConfig.parse(json.loads(json.dumps(data))) == parsed
    assert MixtureConfig.parse(yaml.safe_load(yaml.safe_dump(data))) == parsed
    assert parsed.groups[0].expert.names == NAMES


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_router_is_documented_by_its_function(kind: str) -> None:
    assert ROUTERS[kind].__doc__


CONTRADICTIONS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "another number of experts": ("arrow", {"num_experts": 4}, "num_experts must be as many"),
    "whole FFNs": ("linear", {"site": {"kind": "ffn"}}, "mixes whole FFNs"),
    "a layer's direction": (
        "arrow",
        {"site": {"kind": "linear", "scope": "layer"}},
        "has a vector of each linear's width",
    ),
    "a layer's outputs": (
        "mole",
        {"site": {"kind": "linear", "scope": "block"}},
        "every linear decides for itself",
    ),
    "too few weights": (
        "fixed",
        {"router": {"kind": "fixed", "weights": [1.0]}, "score": {"kind": "identity"}},
        "1 values for 3 experts",
    ),
    "too many chosen": ("arrow", {"select": {"kind": "top_k", "k": 4}}, "top_k=4 exceeds"),
    "directions of experts that are not imported": (
        "arrow",
        {"expert": {"kind": "lora"}},
        "made from experts that are trained already",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_named(case: str) -> None:
    kind, group, message = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=message):
        MixtureConfig.parse(config(GIVEN[kind], **group))


EXPERTS: dict[str, tuple[Any, str]] = {
    "a name twice": (lambda e: e[1].update(name="math"), "two experts are called 'math'"),
    "a name with a path": (lambda e: e[0].update(name="a/b"), "name"),
    "no linears": (lambda e: e[0].update(modules={}), "modules"),
    "a rank of 0": (lambda e: e[0].update(modules={PATHS[0]: [0, 1.0]}), "modules"),
    "a hash that is none": (lambda e: e[0].update(sha256="abc"), "sha256"),
    "a type that is none": (lambda e: e[0].update(dtype="int8"), "dtype"),
    "nobody": (lambda e: e.clear(), "experts"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_that_cannot_be_are_named(case: str) -> None:
    edit, message = EXPERTS[case]
    data = copy.deepcopy(config("linear"))
    edit(data["groups"][0]["expert"]["experts"])
    with pytest.raises(ConfigError, match=message):
        MixtureConfig.parse(data)

"""`molora methods` and `molora schema`: the schema accepts what the parser accepts."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import molora as package
from molora.config.yaml import read_yaml
from molora.errors import ConfigError
from molora.presets import PRESETS, run_config
from molora.presets.frozen import ROUTERS

ROOT = Path(__file__).resolve().parents[2]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
RUN = {"model": {"name": "m"}, "data": {"train": ["a.jsonl"]}, "mixture": {"preset": "mola"}}


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether a value fits a JSON schema, for the keywords that ours uses."""
    if "$ref" in schema and not accepts(
        root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root
    ):
        return False
    if "anyOf" in schema and not any(accepts(s, value, root) for s in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(accepts(s, value, root) for s in schema["oneOf"]) != 1:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "type" in schema and (
        not isinstance(value, TYPES[schema["type"]])
        or (isinstance(value, bool) and schema["type"] != "boolean")
    ):
        return False
    return _in_bounds(schema, value) and _parts_fit(schema, value, root)


def _in_bounds(schema: dict[str, Any], value: Any) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and not value <= schema.get("exclusiveMinimum", value - 1)
            and not value >= schema.get("exclusiveMaximum", value + 1)
        )
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0)
    return not isinstance(value, list) or len(value) >= schema.get("minItems", 0)


def _parts_fit(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), item, root) for item in value)
    if not isinstance(value, dict) or schema.get("type") != "object":
        return True
    known = schema.get("properties", {})
    if not set(schema.get("required", ())) <= set(value):
        return False
    if schema.get("additionalProperties") is False and not set(value) <= set(known):
        return False
    return all(accepts(known.get(key, {}), item, root) for key, item in value.items())


@pytest.fixture
def schema(molora: Callable[..., Any]) -> dict[str, Any]:
    outcome = molora("schema")
    assert outcome.code == 0
    return json.loads(outcome.out)


def parser_accepts(run: dict[str, Any]) -> bool:
    try:
        run_config(run)
    except ConfigError:
        return False
    return True


def with_value(path: str, value: Any) -> dict[str, Any]:
    run = deepcopy(RUN)
    *parents, last = path.split(".")
    section: Any = run
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    return run


def test_methods_lists_every_preset_and_every_router_with_its_paper(
    molora: Callable[..., Any],
) -> None:
    outcome = molora("methods")
    assert outcome.code == 0
    presets, routers = outcome.out.split("\n\n")
    lines = dict(line.split(maxsplit=1) for line in presets.splitlines()[1:])
    assert lines == package.methods()
    lines = dict(line.split(maxsplit=1) for line in routers.splitlines()[1:])
    assert list(lines) == list(ROUTERS)
    assert "2405.11157" in lines["arrow"]


def test_every_configuration_of_the_repository_fits_the_schema(schema: dict[str, Any]) -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    for path in paths:
        run = read_yaml(path)
        assert accepts(schema, run, schema), path.name
        assert not accepts(schema, {**run, "trian": {}}, schema)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_an_alternative_with_its_own_arguments(
    schema: dict[str, Any], preset: str
) -> None:
    for rank in (4, [4, 8], "triangle"):
        run = with_value("mixture", {"preset": preset, "rank": rank, "losses": []})
        assert accepts(schema, run, schema)
        assert parser_accepts(run)
    run["mixture"]["rnak"] = 4
    assert not accepts(schema, run, schema)
    assert not parser_accepts(run)


def test_a_saved_mixture_is_an_alternative(schema: dict[str, Any], adapter: Path) -> None:
    for more, good in (({}, True), ({"losses": []}, True), ({"rank": 2}, False)):
        run = with_value("mixture", {"from": str(adapter), **more})
        assert accepts(schema, run, schema) is good
        assert parser_accepts(run) is good
    assert parser_accepts(with_value("mixture", {"from": "nowhere"})) is False


GROUP = {"targets": "attention", "num_experts": 4, "rank": [2, 3], "select": {"kind": "top_k"}}


@pytest.mark.parametrize(
    ("path", "value", "good"),
    [
        ("mixture", {"groups": [GROUP]}, True),
        ("mixture", {"groups": [{**GROUP, "targets": ["q_proj", "v_proj"]}]}, True),
        ("mixture", {"groups": [{**GROUP, "num_experts": "hourglass"}]}, True),
        ("mixture", {"groups": [{**GROUP, "num_experts": "hourglas"}]}, False),
        ("mixture", {"groups": [{**GROUP, "num_experts": 0}]}, False),
        ("mixture", {"groups": [{**GROUP, "rank": []}]}, False),
        ("mixture", {"groups": [{**GROUP, "select": {"kind": "top_p", "p": 0.5}}]}, True),
        ("mixture", {"groups": [{**GROUP, "select": {"kind": "top_p", "k": 2}}]}, False),
        ("mixture", {"groups": []}, False),
        ("mixture", {"preset": "mloa"}, False),
        ("mixture", {}, False),
        ("mixture", {"from": "nowhere", "rank": 3}, False),
        ("data.train", [{"path": "a.jsonl", "task": "spam"}, "b.csv"], True),
        ("data.train", [], False),
        ("train.learning_rate", 1e-3, True),
        ("train.learning_rate", 0, False),
        ("train.learning_rat", 1e-3, False),
        ("model.dtype", "bf16", False),
        ("seed", -1, False),
    ],
)
def test_schema_and_parser_agree(schema: dict[str, Any], path: str, value: Any, good: bool) -> None:
    run = with_value(path, value)
    assert parser_accepts(run) is good
    assert accepts(schema, run, schema) is good

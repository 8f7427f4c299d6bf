"""Settings, weights, prompts and vectors of other programs: read as they mean them, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from peft_adapters import CONFIG, edit_config, save_adapter
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor

from molora.errors import CheckpointError, ConfigError, MoLoRAError
from molora.io.formats import (
    parsing,
    read_arrow,
    read_gate_vectors,
    read_lorahub_weights,
    read_mergekit_prompts,
    read_mergoo,
    write_gate_vectors,
)
from molora.io.formats.phatgoose import GATES
from molora.io.peft_adapter import read_adapter


def _json(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_an_arrow_router_of_peft_is_read(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        save_adapter(tmp_path / name, seed=seed)
    settings = peft.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=True, rng_seed=5)
    model = peft.create_arrow_model(
        tiny("llama"), [str(tmp_path / "a"), str(tmp_path / "b")], settings, [str(tmp_path / "c")]
    )
    model.save_pretrained(tmp_path / "x")
    found = read_arrow(tmp_path / "x" / "arrow_router")
    assert (found.top_k, found.router_temperature, found.use_gks, found.rng_seed) == (
        2,
        0.7,
        True,
        5,
    )
    assert found.task_adapter_names == ["task_0", "task_1"]
    assert found.gks_adapter_names == ["gks_0"]
    with pytest.raises(ConfigError, match="arrow_config"):
        read_adapter(tmp_path / "x" / "arrow_router")
    with pytest.raises(ConfigError, match="is an adapter, not a router"):
        read_arrow(tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"has no {CONFIG}"):
        read_arrow(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 0},
        {"top_k": "3"},
        {"router_temperature": 0},
        {"router_temperature": float("nan")},
        {"use_gks": 1},
        {"task_adapter_names": [3]},
        {"new": 1},
    ],
)
def test_settings_of_arrow_that_cannot_be_are_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    _json(tmp_path / CONFIG, {"peft_type": "LORA", "arrow_config": {"top_k": 2}})
    assert read_arrow(tmp_path).top_k == 2
    edit_config(tmp_path, arrow_config=changes)
    with pytest.raises(ConfigError, match=f"arrow_config: .*{next(iter(changes))}"):
        read_arrow(tmp_path)


MERGOO = {
    "model_type": "mistral",
    "num_experts_per_tok": 2,
    "base_model": "mistralai/Mistral-7B-v0.1",
    "experts": [
        {"expert_name": "adapter_1", "model_id": "predibase/customer_support"},
        {"expert_name": "adapter_2", "model_id": "../up"},
        {"expert_name": "adapter_3", "model_id": "predibase/customer_support_orders"},
    ],
}


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_mergoo_settings_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(MERGOO) if name == "a.json" else yaml.safe_dump(MERGOO))
    found = read_mergoo(path)
    assert (found.num_experts, found.num_experts_per_tok) == (3, 2)
    assert found.base_model == "mistralai/Mistral-7B-v0.1"
    assert [expert.expert_name for expert in found.experts] == [f"adapter_{n}" for n in (1, 2, 3)]
    assert found.experts[1].model_id == "../up"
    assert found.router_layers is None


def test_what_mergoo_composed_is_read(tmp_path: Path) -> None:
    composed = {
        "model_type": "mistral",
        "hidden_size": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "router_layers": ["q_proj"],
        "router_layers_index": [0, 1],
        "adapter_configs": [{}, {}],
    }
    found = read_mergoo(_json(tmp_path / "config.json", composed))
    assert (found.num_experts, found.router_layers, found.router_layers_index) == (
        2,
        ("q_proj",),
        (0, 1),
    )
    with pytest.raises(ConfigError, match="there are 2 adapter_configs"):
        read_mergoo(_json(tmp_path / "config.json", {**composed, "num_experts": 3}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": None, "experts": None}, "base_model"),
        ({"num_experts_per_tok": 4}, "is 4, of 3 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"experts": [MERGOO["experts"][0]] * 3}, "two experts have one"),  # type: ignore[index]
        ({"experts": {"a": 1}}, "experts"),
        ({"experts": [{"expert_name": "a"}]}, "model_id"),
        ({"router_layers": "q_proj"}, "router_layers"),
        ({"router_layers_index": [None]}, "router_layers_index"),
    ],
)
def test_mergoo_settings_that_cannot_be_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_mergoo(_json(tmp_path / "a.json", {**MERGOO, **changes}))
    whole = {key: value for key, value in MERGOO.items() if key != "base_model"}
    with pytest.raises(ConfigError, match="other mixtures hold whole models"):
        read_mergoo(_json(tmp_path / "a.json", whole))


def test_weights_of_lorahub_are_read_both_ways(tmp_path: Path) -> None:
    names = ["lorahub/flan_t5_large-a", "b", "c"]
    both = {"modules": names, "weights": [0.5, -1.5, 0]}
    one = read_lorahub_weights(_json(tmp_path / "a", both))
    other = read_lorahub_weights(
        _json(tmp_path / "b", dict(zip(names, both["weights"], strict=True)))
    )
    assert one == other == {"lorahub/flan_t5_large-a": 0.5, "b": -1.5, "c": 0.0}
    assert list(one) == names


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        {"modules": ["a"]},
        {"modules": ["a", "b"], "weights": [1]},
        {"modules": ["a", "a"], "weights": [1, 2]},
        {"modules": [], "weights": []},
        {"modules": ["a"], "weights": [1], "more": 1},
        {"a": "1"},
        {"a": True},
        {"a": None},
        {"a": float("inf")},
        {"a": float("nan")},
        {"a": 1001},
        {"a" * 5000: 1},
    ],
    ids=lambda data: str(data)[:30],
)
def test_weights_that_are_none_are_refused(tmp_path: Path, data: object) -> None:
    with pytest.raises((ConfigError, CheckpointError)):
        read_lorahub_weights(_json(tmp_path / "a", data))


PROMPTS = """
base_model: path/to/self_attn_donor
gate_mode: hidden # one of "hidden", "cheap_embed", or "random"
dtype: bfloat16
experts:
  - source_model: base+adapters/math
    positive_prompts:
      - "solve for x"
      - "1 + 1"
    negative_prompts:
      - "rhyme"
  - source_model: other
    positive_prompts: ["a poem"]
    negative_prompts:
"""


def test_prompts_of_mergekit_are_read(tmp_path: Path) -> None:
    path = tmp_path / "moe.yml"
    path.write_text(PROMPTS)
    found = read_mergekit_prompts(path)
    assert (found.base_model, found.gate_mode, found.experts_per_token) == (
        "path/to/self_attn_donor",
        "hidden",
        2,
    )
    math, other = found.experts
    assert math.positive_prompts == ("solve for x", "1 + 1")
    assert math.negative_prompts == ("rhyme",)
    assert (math.adapter, other.adapter) == ("adapters/math", None)
    assert other.negative_prompts == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hidden #", "other #", "gate_mode"),
        ("base_model: path/to/self_attn_donor", "", "base_model"),
        ('positive_prompts: ["a poem"]', "", "expert 1 has no positive_prompts"),
        ("dtype: bfloat16", "experts_per_token: 3", "is 3, of 2 experts"),
        ("dtype: bfloat16", "shared_experts: [{source_model: a}]", "act on every token"),
        ("dtype: bfloat16", "new: 1", "unknown key 'new'"),
        ("- source_model: other", "- source_model: 3", "source_model"),
        ("dtype: bfloat16", "dtype: !!python/name:os.system", "tags"),
        ("dtype: bfloat16", "x: &a [1]\ndtype: *a", "aliases"),
        ("  - source_model: other\n", "  - 3\n  - source_model: other\n", "experts.1"),
        ("experts:", "experts: [", "not valid YAML"),
    ],
)
def test_prompts_that_are_none_are_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "moe.yml"
    assert old in PROMPTS
    path.write_text(PROMPTS.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_mergekit_prompts(path)


def test_prompts_are_not_needed_where_rows_are_random(tmp_path: Path) -> None:
    path = tmp_path / "moe.yml"
    same = "base_model: a\nexperts: [{source_model: a, positive_prompts: [x]}, "
    path.write_text(same + "{source_model: b, positive_prompts: [x]}]\n")
    with pytest.raises(ConfigError, match="prompts of all experts are the same"):
        read_mergekit_prompts(path)
    path.write_text(
        "base_model: a\ngate_mode: random\nexperts: [{source_model: a}, {source_model: a}]\n"
    )
    assert len(read_mergekit_prompts(path).experts) == 2


def _vectors(directory: Path) -> dict[str, Tensor]:
    modules = read_adapter(directory).modules
    return {name: torch.randn(module.lora_A.shape[1]) for name, module in modules.items()}


def test_gate_vectors_are_read_as_they_were_written(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj", "down_proj"])
    adapter, vectors = read_adapter(tmp_path), _vectors(tmp_path)
    vectors["model.layers.0.mlp.down_proj"] = vectors["model.layers.0.mlp.down_proj"].bfloat16()
    file = write_gate_vectors(tmp_path, vectors, adapter=adapter)
    assert file == tmp_path / GATES
    found = read_gate_vectors(tmp_path, adapter=adapter)
    assert found.keys() == vectors.keys()
    for name, vector in vectors.items():
        assert torch.equal(found[name], vector)
        assert found[name].dtype == vector.dtype
    assert set(load_file(file)) == {f"{name}.gate" for name in vectors}
    assert read_adapter(tmp_path).notes == adapter.notes


def _put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda vectors: vectors.update({name: tensor})


VECTORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "matrix": _put("a.gate", torch.ones(2, 2)),
    "empty": _put("a.gate", torch.ones(0)),
    "type": _put("a.gate", torch.ones(2, dtype=torch.float64)),
    "name": _put("a.vector", torch.ones(2)),
    "no name": _put(".gate", torch.ones(2)),
    "path": _put("../a.gate", torch.ones(2)),
    "long": _put("a" * 600 + ".gate", torch.ones(2)),
    "NaN": _put("a.gate", torch.full((2,), float("nan"))),
    "nothing": lambda vectors: vectors.clear(),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_gate_vectors_that_are_none_are_refused(tmp_path: Path, kind: str) -> None:
    tensors = {"b.gate": torch.ones(3)}
    save_file(tensors, tmp_path / GATES)
    assert list(read_gate_vectors(tmp_path)) == ["b"]
    VECTORS[kind](tensors)
    save_file(tensors, tmp_path / GATES)
    with pytest.raises(CheckpointError):
        read_gate_vectors(tmp_path)
    vectors = {name.removesuffix(".gate"): tensor for name, tensor in tensors.items()}
    if kind not in ("name", "empty", "long"):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        with pytest.raises(CheckpointError):
            write_gate_vectors(tmp_path, vectors)
        assert not list(tmp_path.iterdir())


def test_gate_vectors_of_another_adapter_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    adapter, vectors = read_adapter(tmp_path), _vectors(tmp_path)
    name = next(iter(vectors))
    lacking = {key: vector for key, vector in vectors.items() if key != name}
    for wrong in (lacking, {**vectors, "other": vectors[name]}, {**vectors, name: torch.ones(5)}):
        with pytest.raises(CheckpointError, match="differ at"):
            write_gate_vectors(tmp_path, wrong, adapter=adapter)
        write_gate_vectors(tmp_path, wrong)
        with pytest.raises(CheckpointError, match="differ at"):
            read_gate_vectors(tmp_path, adapter=adapter)


def test_the_size_of_a_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _json(tmp_path / "a", {"a": 1})
    monkeypatch.setattr(parsing, "MAX_CONFIG", path.stat().st_size)
    assert read_lorahub_weights(path)
    monkeypatch.setattr(parsing, "MAX_CONFIG", path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="bytes, and at most"):
        read_lorahub_weights(path)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "9" * 5000, "\ud800"])
@pytest.mark.parametrize("read", [read_mergoo, read_lorahub_weights])
def test_a_file_that_is_none_is_refused(
    tmp_path: Path, read: Callable[[Path], object], text: str
) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(CheckpointError, match="is no file"):
        read(path)
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(MoLoRAError):
        read(path)

"""Adapters written for package peft: for us the same tensors, for it the same logits."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_adapters import CONFIG, TENSORS, edit_config, edit_tensors, save_adapter
from safetensors import safe_open
from tiny_models import batch_for, tiny
from torch import Tensor, nn

from molora.errors import CheckpointError, ConfigError
from molora.io.adapter import Adapter, AdapterModule, ExpertParameter
from molora.io.peft_adapter import read_adapter
from molora.io.peft_config import parse_config, ranks_and_scalings
from molora.io.peft_write import (
    adapter_config,
    check_adapter_names,
    write_adapter,
    write_adapters,
)

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "r": 6}),
    "rslora, a square": ("llama", {"use_rslora": True, "r": 4}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            "rank_pattern": {r".*layers\.0\..*k_proj": 2, "k_proj": 5, "v_proj": 4},
            "alpha_pattern": {r".*1\..*\.(q|v)_proj": 11, "down_proj": 2.5},
        },
    ),
    "rslora patterns": (
        "mistral",
        {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"^model.*v_proj": 3}},
    ),
    "a layer": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "wo"]}),
    "bias": ("qwen2", {"lora_bias": True}),
    "dora": ("llama", {"use_dora": True}),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch_for(model, labels=False)).logits
    return found


def write(directory: Path, adapter: Adapter) -> None:
    write_adapters(directory.parent, {directory.name: adapter})


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_is_written_again_is_the_same(kind: str, tmp_path: Path) -> None:
    family, settings = ADAPTERS[kind]
    model = save_adapter(tmp_path / "source", family, **settings)
    for parameter in model.parameters():  # a bias beside lora_B starts at zero
        if parameter.requires_grad and parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", base_model_name_or_path="org/base", revision="v2")
    source = read_adapter(tmp_path / "source")
    write(tmp_path / "written", source)
    again = read_adapter(tmp_path / "written")
    assert list(again.modules) == list(source.modules)
    for path, module in source.modules.items():
        other = again.modules[path]
        assert other.scaling == module.scaling
        for name in ("lora_A", "lora_B", "bias", "magnitude"):
            one, two = getattr(module, name), getattr(other, name)
            assert (one is None) == (two is None)
            assert one is None or (torch.equal(one, two) and one.dtype == two.dtype)
    assert not again.notes
    assert (again.base, again.revision) == ("org/base", "v2")
    assert again.fan_in_fan_out == source.fan_in_fan_out
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "written").eval()
    assert torch.equal(logits(theirs), logits(model))
    assert not torch.allclose(logits(tiny(family)), logits(model), atol=1e-3)


STACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"]}),
    "both": (
        "mixtral",
        {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    ),
    "router": ("mixtral", {"target_parameters": ["gate.weight", "mlp.experts.gate_up_proj"]}),
    "with modules": (
        "mixtral",
        {
            "target_parameters": ["down_proj", "gate_up_proj"],
            "target_modules": ["q_proj"],
            "rank_pattern": {r".*\.gate_up_proj": 6, r"layers\.1\.mlp\.experts\.down_proj": 2},
            "use_rslora": True,
        },
    ),
    "layer": ("mixtral", {"target_parameters": ["layers.1.mlp.experts.down_proj"]}),
}


@pytest.mark.parametrize("kind", STACKED)
def test_factors_of_stacked_weights_are_the_same(kind: str, tmp_path: Path) -> None:
    family, settings = STACKED[kind]
    model = save_adapter(tmp_path / "source", family, **{"target_modules": [], **settings})
    source = read_adapter(tmp_path / "source")
    write(tmp_path / "written", source)
    again = read_adapter(tmp_path / "written")
    assert source.parameters
    assert again.parameters.keys() == source.parameters.keys()
    assert again.modules.keys() == source.modules.keys()
    for name, one in source.parameters.items():
        two = again.parameters[name]
        assert torch.equal(one.lora_A, two.lora_A)
        assert torch.equal(one.lora_B, two.lora_B)
        assert one.scaling == two.scaling
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "written").eval()
    assert torch.equal(logits(theirs), logits(model))
    assert not torch.allclose(logits(tiny(family)), logits(model), atol=1e-3)


def test_parameters_whose_order_is_not_known_are_refused(tmp_path: Path) -> None:
    part = ExpertParameter(torch.ones(2, 3, 4), torch.ones(2, 5, 3), 1.0, 1.0)
    adapter = _tiny(parameters={"odd_part.weight": part})
    with pytest.raises(ConfigError, match="cannot be called odd_part: package peft"):
        write_adapters(tmp_path, {"odd_part": adapter})
    with pytest.raises(ConfigError, match="which is within which is known for gate_up_proj"):
        write_adapter(tmp_path / "x", {}, {"a.experts.left": part, "a.experts.down_proj": part})


def test_an_activated_lora_keeps_its_tokens(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM")
    write(tmp_path / "b", read_adapter(tmp_path / "a"))
    assert read_adapter(tmp_path / "b").invocation_tokens == (7, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_keep_their_type_and_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a")
    edit_tensors(
        tmp_path / "a", lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()})
    )
    source = read_adapter(tmp_path / "a")
    write(tmp_path / "b", source)
    with safe_open(tmp_path / "b" / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for path, module in read_adapter(tmp_path / "b").modules.items():
        for one, two in (
            (module.lora_A, source.modules[path].lora_A),
            (module.lora_B, source.modules[path].lora_B),
        ):
            assert one.dtype == dtype
            assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_rslora_is_kept_only_where_it_must_be(tmp_path: Path) -> None:
    def written(rank: int, scaling: float) -> dict[str, Any]:
        factors = torch.zeros(rank, 4), torch.zeros(5, rank)
        return adapter_config({"a.q_proj": AdapterModule(*factors, scaling, 0.0)})

    plain = written(6, 5 / 6)
    assert (plain["use_rslora"], plain["r"], plain["lora_alpha"]) == (False, 6, 5)
    assert isinstance(plain["lora_alpha"], int)
    scaling = next(s for a in range(1, 99) if not _exists(s := a / math.sqrt(6), 6))
    kept = written(6, scaling)
    assert kept["use_rslora"]
    assert kept["lora_alpha"] / math.sqrt(6) == scaling
    assert not written(4, 5 / math.sqrt(4))["use_rslora"]


def _exists(scaling: float, rank: int) -> bool:
    near = scaling * rank
    return any(
        alpha / rank == scaling
        for alpha in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    )


def test_scalings_that_no_alpha_gives_are_refused() -> None:
    odd = next(
        s
        for s in (1.4 + i * 2.0**-52 for i in range(9999))
        if not _exists(s, 3) and all(a / math.sqrt(3) != s for a in _near(s * math.sqrt(3)))
    )
    module = AdapterModule(torch.zeros(3, 4), torch.zeros(5, 3), odd, 0.0)
    with pytest.raises(ConfigError, match="No alpha gives all the scalings"):
        adapter_config({"a.q_proj": module})
    for impossible in (math.inf, math.nan):
        with pytest.raises(ConfigError, match="No alpha"):
            adapter_config({"a.q_proj": replace(module, scaling=impossible)})


def _near(value: float) -> list[float]:
    return [value, math.nextafter(value, math.inf), math.nextafter(value, -math.inf)]


PATHS = [
    *(f"model.layers.{layer}.{name}" for layer in (0, 1, 10) for name in ("q_proj", "mlp.up-x")),
    *("q_proj", "other.model.layers.0.q_proj", "model.layersX0.q_proj", "modelXlayersX1Xq_proj"),
]


@given(
    st.dictionaries(
        st.sampled_from(PATHS),
        st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 2.5, 7, -3, 0])),
        min_size=1,
    ),
    st.booleans(),
)
def test_patterns_give_each_module_its_rank_and_scaling(
    wanted: dict[str, tuple[int, float]], rslora: bool
) -> None:
    modules = {
        path: AdapterModule(
            torch.zeros(r, 4), torch.zeros(5, r), alpha / (math.sqrt(r) if rslora else r), 0.0
        )
        for path, (r, alpha) in wanted.items()
    }
    config = json.loads(json.dumps(adapter_config(modules)))
    parsed, notes = parse_config(config, where="here")
    found = ranks_and_scalings(parsed, list(modules), where="here")
    assert found == {path: (m.rank, m.scaling) for path, m in modules.items()}
    assert not notes


def test_patterns_are_short_where_modules_of_a_name_agree() -> None:
    modules = {
        f"model.layers.{layer}.{name}": AdapterModule(
            torch.zeros(rank, 4), torch.zeros(5, rank), 2.0, 0.0
        )
        for layer in range(12)
        for name, rank in {"q_proj": 4, "k_proj": 4, "v_proj": 8}.items()
    }
    config = adapter_config(modules)
    assert config["rank_pattern"] == {"v_proj": 8}
    assert config["alpha_pattern"] == {"v_proj": 16}
    assert config["target_modules"] == sorted(modules)
    leaves = adapter_config(modules, leaf_targets=True)
    assert leaves["target_modules"] == ["k_proj", "q_proj", "v_proj"]


def test_a_layer_alone_is_targeted_alone_unless_leaves_are_asked_for(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", layers_to_transform=[1], layers_pattern="layers")
    source = read_adapter(tmp_path / "a")
    write_adapter(tmp_path / "whole", source.modules)
    write_adapter(tmp_path / "leaves", source.modules, leaf_targets=True)
    counts = {}
    for name in ("whole", "leaves"):
        model = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / name)
        counts[name] = sum("lora_A" in key for key in model.state_dict())
    assert counts == {"whole": 2, "leaves": 4}


@pytest.mark.parametrize("name", ["0", "17", "mlp", "q_proj", "model", "lora_A", "odd_part"])
def test_names_that_peft_would_lose_tensors_by_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot be called {name}: package peft"):
        check_adapter_names(["law", name], ["model.layers.0.odd_part.proj"])
    save_adapter(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    check_adapter_names(["law", "math-2"], adapter.modules)
    if name != "odd_part":
        with pytest.raises(ConfigError, match="package peft"):
            write_adapters(tmp_path / "out", {"law": adapter, name: adapter})
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x", "", "a.b", "a/b", ".x"])
def test_names_that_are_no_directories_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="directories are called"):
        write_adapters(tmp_path / "out", {name: _tiny()})


def _tiny(**changes: Any) -> Adapter:
    module = AdapterModule(torch.ones(2, 4), torch.ones(5, 2), 0.5, 1.0)
    adapter = Adapter(Path("x"), {"a.proj": module, "b.proj": module}, None, None, False, "", ())
    return replace(adapter, **changes)


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "law", _tiny())
    before = {path.name: path.read_bytes() for path in (tmp_path / "law").iterdir()}
    assert set(before) == {CONFIG, TENSORS}
    with pytest.raises(CheckpointError, match="is not empty"):
        write(tmp_path / "law", _tiny())
    assert {path.name: path.read_bytes() for path in (tmp_path / "law").iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is no directory"):
        write(tmp_path / "file", _tiny())
    (tmp_path / "link").symlink_to(tmp_path / "law")
    with pytest.raises(CheckpointError, match="is no directory"):
        write(tmp_path / "link", _tiny())
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", _tiny())
    write(tmp_path / "deep" / "er" / "law", _tiny())
    assert {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()} == before


@pytest.mark.parametrize("fails", ["save_file", "flush", "replace"])
def test_a_fault_leaves_nothing(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    if fails == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(f"molora.io.peft_write.{fails}", fail)
    with pytest.raises(CheckpointError, match="cannot be written: no space left"):
        write(tmp_path / "law", _tiny())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        ({"lora_A": torch.ones(2, 4).double()}, CheckpointError, "is torch.float64"),
        ({"magnitude": torch.ones(5)}, ConfigError, "a part of the modules has no magnitude"),
        ({"scaling": 1e12}, ConfigError, "alpha_pattern.*less than or equal to 1000000000"),
    ],
)
def test_modules_that_cannot_be_said(
    module: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    modules = _tiny().modules
    with pytest.raises(error, match=message):
        write_adapter(tmp_path / "x", {**modules, "b.proj": replace(modules["b.proj"], **module)})
    assert list(tmp_path.iterdir()) == []
    for wrong in ({}, {"a..b": modules["a.proj"]}):
        with pytest.raises(ConfigError, match="adapts modules by name"):
            write_adapter(tmp_path / "x", wrong)


def test_modules_without_the_others_bias_get_zeros(tmp_path: Path) -> None:
    modules = dict(_tiny().modules)
    modules["b.proj"] = replace(modules["b.proj"], bias=torch.full((5,), 2.0))
    write_adapter(tmp_path / "x", modules)
    found = read_adapter(tmp_path / "x").modules
    assert found["a.proj"].bias is not None
    assert found["b.proj"].bias is not None
    assert not found["a.proj"].bias.any()
    assert found["b.proj"].bias.tolist() == [2.0] * 5

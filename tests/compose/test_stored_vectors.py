"""Vectors of experts, saved and read again: the same, or an error that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import load_set, logits, save_set
from peft_adapters import edit_tensors
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor

import molora
from molora.compose.experts import FrozenExperts
from molora.compose.stored_vectors import load_vectors, save_vectors
from molora.errors import CheckpointError, ConfigError

SET: dict[str, Any] = {"math": {"target_modules": ["q_proj", "down_proj"]}, "code": {"r": 5}}
PATH = "model.layers.0.self_attn.q_proj"


def vectors_for(experts: FrozenExperts, *names: str) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(2)
    return {
        name: {p: torch.randn(m.lora_A.shape[1]) for p, m in adapter.modules.items()}
        for name, adapter in experts.adapters.items()
        if name in (names or experts.names)
    }


def test_vectors_are_read_as_they_were_saved_at_once_or_one_by_one(tmp_path: Path) -> None:
    experts = load_set(tmp_path / "set", SET)
    vectors = vectors_for(experts)
    save_vectors(tmp_path / "once", vectors, experts, kind="gate")
    for name in reversed(SET):
        save_vectors(tmp_path / "each", {name: vectors[name]}, experts, kind="gate")
    for place in ("once", "each"):
        found = load_vectors(tmp_path / place, experts, kind="gate")
        assert [*found] == [*SET]
        for name, by_path in vectors.items():
            assert found[name].keys() == by_path.keys()
            assert all(torch.equal(found[name][path], v) for path, v in by_path.items())
        assert len(list((tmp_path / place).iterdir())) == 4
    model, other = tiny("llama"), tiny("llama")
    molora.compose(model, experts, router={"kind": "phatgoose", "vectors": vectors})
    molora.compose(other, experts, router={"kind": "phatgoose", "vectors": found})
    assert torch.equal(logits(model), logits(other))


def test_saving_again_replaces_the_experts_own_files(tmp_path: Path) -> None:
    experts = load_set(tmp_path / "set", SET)
    first = vectors_for(experts)
    save_vectors(tmp_path / "there", first, experts, kind="mean")
    later = {"code": {path: v + 1 for path, v in first["code"].items()}}
    save_vectors(tmp_path / "there", later, experts, kind="mean")
    found = load_vectors(tmp_path / "there", experts, kind="mean")
    assert torch.equal(found["code"][PATH], later["code"][PATH])
    assert torch.equal(found["math"][PATH], first["math"][PATH])
    assert len(list((tmp_path / "there").iterdir())) == 4


def _file(directory: Path) -> Path:
    (found,) = directory.glob("math-*.safetensors")
    return found


def _change(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = load_file(_file(directory))
        edit(tensors)
        save_file(tensors, _file(directory))

    return change


def _value(directory: Path) -> None:
    path = directory / "math.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "gate", "expert": "x"}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda d: _file(d).unlink(), r"safetensors"),
    "no description": (lambda d: (d / "math.json").unlink(), r"math\.json"),
    "another value": (_change(lambda t: t[PATH].add_(1)), "SHA-256"),
    "another tensor": (_change(lambda t: t.update(x=torch.ones(3))), "other tensors"),
    "a description that was changed": (_value, "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    edit, message = DAMAGE[damage]
    experts = load_set(tmp_path / "set", SET)
    save_vectors(tmp_path / "there", vectors_for(experts), experts, kind="gate")
    edit(tmp_path / "there")
    with pytest.raises(CheckpointError, match=message):
        load_vectors(tmp_path / "there", experts, kind="gate")


def test_vectors_of_something_else_are_refused(tmp_path: Path) -> None:
    dirs = save_set(tmp_path / "set", SET)
    experts = molora.load_experts(dirs)
    there = tmp_path / "there"
    save_vectors(there, vectors_for(experts), experts, kind="mean")
    with pytest.raises(CheckpointError, match="of kind 'mean'; this needs 'gate'"):
        load_vectors(there, experts, kind="gate")
    edit_tensors(dirs["math"], lambda t: t.update({n: t[n] * 2 for n in t}))
    with pytest.raises(CheckpointError, match="belongs to another adapter"):
        load_vectors(there, molora.load_experts(dirs), kind="mean")
    experts = load_set(tmp_path / "again", SET)
    for fault in ({PATH: torch.ones(7)}, {"x": torch.ones(32)}, {PATH: torch.ones(1, 32)}):
        vectors = vectors_for(experts)
        vectors["code"].update(fault)
        save_vectors(tmp_path / "odd", vectors, experts, kind="gate")
        with pytest.raises(CheckpointError, match="the expert needs a vector"):
            load_vectors(tmp_path / "odd", experts, kind="gate")
    with pytest.raises(ConfigError, match="unknown expert 'law'"):
        save_vectors(there, {"law": {}}, experts, kind="gate")
    bad = {"math": {PATH: torch.full((32,), torch.nan)}}
    with pytest.raises(CheckpointError, match="NaN"):
        save_vectors(there, bad, experts, kind="gate")

"""GenKnowSub in the exact form, against dense float64 algebra."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import save_adapter
from tiny_models import batch_for, tiny
from torch import Tensor

import molora
from molora.compose.experts import FrozenExperts
from molora.compose.general import subtract_general
from molora.errors import CheckpointError, ConfigError
from molora.io.peft_adapter import Adapter
from molora.io.peft_write import write_adapters


def update(adapter: Adapter, path: str) -> Tensor | float:
    if path not in adapter.modules:
        return 0.0
    module = adapter.modules[path]
    return module.scaling * module.lora_B.double() @ module.lora_A.double()


def experts(tmp_path: Path, seed: int = 0, **settings: dict[str, Any]) -> FrozenExperts:
    for number, (name, own) in enumerate(settings.items(), seed):
        save_adapter(tmp_path / name, seed=number, **own)
    return molora.load_experts({name: tmp_path / name for name in settings})


def test_the_mean_of_the_general_updates_is_subtracted_exactly(tmp_path: Path) -> None:
    tasks = experts(tmp_path, law={"r": 2, "use_rslora": True}, code={"target_modules": ["k_proj"]})
    general = experts(
        tmp_path, 5, en={"r": 4}, de={"r": 1, "target_modules": ["v_proj", "up_proj"]}
    )
    before = {
        (name, path): (m.lora_A.clone(), m.lora_B.clone(), m.scaling)
        for name, one in tasks.adapters.items()
        for path, m in one.modules.items()
    }
    found = subtract_general(tasks, general)
    assert found.names == tasks.names
    for name, adapter in found.adapters.items():
        original = tasks.adapters[name]
        assert set(adapter.modules) == set(original.modules) | set(general.modules)
        for path, module in adapter.modules.items():
            mean = (update(general.adapters["en"], path) + update(general.adapters["de"], path)) / 2
            expected = torch.as_tensor(update(original, path) - mean)
            dense = update(adapter, path)
            assert float((dense - expected).norm() / expected.norm()) < 1e-6
            assert module.update_norm == pytest.approx(float(expected.norm()), rel=1e-6)
            plain = torch.as_tensor(update(original, path))
            if path in general.modules:
                assert float((dense - plain).norm() / expected.norm()) > 0.1
        assert adapter.sha256 != original.sha256
        assert any("2 was subtracted" in note for note in adapter.notes)
    for (name, path), (lora_A, lora_B, scaling) in before.items():
        module = tasks.adapters[name].modules[path]
        assert torch.equal(module.lora_A, lora_A)
        assert torch.equal(module.lora_B, lora_B)
        assert module.scaling == scaling


def test_an_expert_minus_itself_is_nothing(tmp_path: Path) -> None:
    tasks = experts(tmp_path, law={"r": 3})
    for module in subtract_general(tasks, tasks).adapters["law"].modules.values():
        assert module.update_norm < 1e-5


def test_biases_are_subtracted_too(tmp_path: Path) -> None:
    tasks, general = experts(tmp_path, law={}), experts(tmp_path, 5, en={}, de={})
    path = tasks.modules[0]
    size = tasks.adapters["law"].modules[path].lora_B.shape[0]
    for one, value in ((tasks.adapters["law"], 3.0), (general.adapters["de"], 8.0)):
        modules = dict(one.modules)
        modules[path] = replace(modules[path], bias=torch.full((size,), value), scaling=0.5)
        one = replace(one, modules=modules)
        if value == 3.0:
            tasks = FrozenExperts({"law": one}, ())
        else:
            general = FrozenExperts({**general.adapters, "de": one}, ())
    found = subtract_general(tasks, general).adapters["law"].modules
    assert found[path].bias is not None
    assert found[path].bias.tolist() == [0.5 * 3 - 0.5 * 8 / 2] * size
    assert found[tasks.modules[1]].bias is None


def test_the_new_experts_go_on_a_model_and_into_files(tmp_path: Path) -> None:
    tasks = experts(tmp_path, law={"r": 2}, code={"r": 5})
    general = experts(tmp_path, 5, en={}, de={"target_modules": ["v_proj", "up_proj"]})
    found = subtract_general(tasks, general)
    write_adapters(tmp_path / "out", found.adapters)
    again = molora.load_experts({name: tmp_path / "out" / name for name in found.names})
    model, reference = tiny("llama"), tiny("llama")
    batch = batch_for(model, labels=False)
    molora.compose(model, again, router="uniform")
    with torch.no_grad():
        logits = model(**batch).logits
        plain = reference(**batch).logits
        for path in found.modules:
            parts = [torch.as_tensor(update(one, path)) for one in tasks.adapters.values()]
            mean = torch.as_tensor(sum(update(one, path) for one in general.adapters.values())) / 2
            change = (parts[0] + parts[1]) / 2 - mean
            reference.get_submodule(path).weight += change.float()
        expected = reference(**batch).logits
    assert torch.allclose(logits, expected, atol=2e-5)
    assert not torch.allclose(logits, plain, atol=1e-2)


def test_what_cannot_be_subtracted(tmp_path: Path) -> None:
    tasks = experts(tmp_path, law={})
    with pytest.raises(ConfigError, match="No general adapters"):
        subtract_general(tasks, FrozenExperts({}, ()))
    with pytest.raises(ConfigError, match="en uses DoRA"):
        subtract_general(tasks, experts(tmp_path, en={"use_dora": True}))
    other = experts(tmp_path, de={})
    path = other.modules[0]
    modules = dict(other.adapters["de"].modules)
    modules[path] = replace(modules[path], lora_A=torch.ones(3, 7))
    wrong = FrozenExperts({"de": replace(other.adapters["de"], modules=modules)}, ())
    with pytest.raises(CheckpointError, match=r"of law and the general adapters differ in size: 7"):
        subtract_general(tasks, wrong)

"""X-LoRA directories: package peft's read here, ours read there."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_adapters import save_adapter
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import nn
from xlora_models import (
    SETTINGS,
    composed,
    logits,
    peft_model,
    set_classifier,
    write_directories,
)

import molora
from molora.compose.xlora import compose_xlora, export_xlora
from molora.errors import AttachError, CheckpointError, ConfigError

CLASSIFIER = "base_model.internal_xlora_classifier."


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_directories(tmp_path_factory.mktemp("xlora"))


def loaded_by_peft(directory: Path) -> nn.Module:
    model = tiny("llama").eval()
    model.config.use_cache = False
    return peft.PeftModel.from_pretrained(model, directory).eval()


@pytest.mark.parametrize("ours", [ours for ours, _ in SETTINGS.values()], ids=list(SETTINGS))
def test_package_peft_loads_an_export_to_the_same_logits(
    ours: dict[str, Any], directories: dict[str, Path], tmp_path: Path
) -> None:
    model, mixture = composed(directories, **ours)
    set_classifier(mixture)
    export_xlora(mixture, tmp_path / "xlora")
    expected = logits(model)
    other = loaded_by_peft(tmp_path / "xlora")
    torch.testing.assert_close(logits(other), expected, atol=1e-5, rtol=1e-5)
    assert (logits(tiny("llama").eval()) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("ours", [ours for ours, _ in SETTINGS.values()], ids=list(SETTINGS))
def test_an_export_comes_back_after_a_move(
    ours: dict[str, Any], directories: dict[str, Path], tmp_path: Path
) -> None:
    model, mixture = composed(directories, **ours)
    set_classifier(mixture)
    export_xlora(mixture, tmp_path / "xlora")
    shutil.move(tmp_path / "xlora", tmp_path / "moved")
    again = tiny("llama").eval()
    other = compose_xlora(again, tmp_path / "moved")
    assert torch.equal(logits(again), logits(model))
    assert other.config.groups[0].router == mixture.config.groups[0].router
    assert other.config.groups[0].gate_scale == mixture.config.groups[0].gate_scale


def saved_by_peft(directories: dict[str, Path], out: Path, **options: Any) -> nn.Module:
    """Package peft's directory with the classifier that it forgets."""
    model = peft_model(directories, **options)
    classifier = model.base_model.internal_xlora_classifier
    for tensor in classifier.state_dict().values():
        nn.init.normal_(tensor, std=0.3)
    model.save_pretrained(out)
    tensors = {f"{CLASSIFIER}{k}": v.clone() for k, v in classifier.state_dict().items()}
    (out / "adapter_model.safetensors").unlink()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("options", [theirs for _, theirs in SETTINGS.values()], ids=list(SETTINGS))
def test_package_pefts_directories_give_its_logits(
    options: dict[str, Any], directories: dict[str, Path], tmp_path: Path
) -> None:
    theirs = saved_by_peft(directories, tmp_path / "theirs", **options)
    model = tiny("llama").eval()
    adapters = {str(n): path for n, path in enumerate(directories.values())}
    compose_xlora(model, tmp_path / "theirs", adapters=adapters)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_classifier_that_lost_layers_is_refused_or_starts_anew(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    model = peft_model(directories, xlora_depth=2, xlora_size=16)
    model.save_pretrained(tmp_path / "theirs")
    adapters = {str(n): path for n, path in enumerate(directories.values())}
    base = tiny("llama").eval()
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.0"):
        compose_xlora(base, tmp_path / "theirs", adapters=adapters)
    mixture = compose_xlora(base, tmp_path / "theirs", adapters=adapters, allow_reinit=True)
    kept = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    own = mixture.built.routers["router"].state_dict()
    assert torch.equal(own["layers.3.weight"], kept[f"{CLASSIFIER}layers.3.weight"])
    assert own["layers.0.weight"].abs().max() > 0


def test_classifiers_of_other_bases_are_refused_and_the_model_stays(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    _, mixture = composed(directories)
    export_xlora(mixture, tmp_path / "xlora")
    path = tmp_path / "xlora" / "adapter_config.json"
    tensors = load_file(tmp_path / "xlora" / "adapter_model.safetensors")
    weight = tensors[f"{CLASSIFIER}layers.0.weight"]
    tensors[f"{CLASSIFIER}layers.0.weight"] = weight[:, :-1].contiguous()
    save_file(tensors, tmp_path / "xlora" / "adapter_model.safetensors")
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "hidden_size": settings["hidden_size"] - 1}))
    base = tiny("llama").eval()
    with pytest.raises(AttachError, match="trained on another base"):
        compose_xlora(base, tmp_path / "xlora")
    assert not any("lora" in name or "router" in name for name, _ in base.named_parameters())


def test_what_package_peft_cannot_run_is_not_exported(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny("llama").eval()
    mixture = molora.compose(model, molora.load_experts(directories), router="arrow")
    with pytest.raises(ConfigError, match="of kind 'projection'; only X-LoRA"):
        export_xlora(mixture, tmp_path / "out")
    mixture.detach()
    masked = molora.compose(model, molora.load_experts(directories), router="xlora", missing="mask")
    with pytest.raises(ConfigError, match="missing='mask': package peft loses"):
        export_xlora(masked, tmp_path / "out")
    masked.detach()
    save_adapter(tmp_path / "dora", use_dora=True)
    dora = molora.compose(model, molora.load_experts({"dora": tmp_path / "dora"}), router="xlora")
    with pytest.raises(ConfigError, match="expert dora has DoRA"):
        export_xlora(dora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use_is_left_alone(directories: dict[str, Path], tmp_path: Path) -> None:
    _, mixture = composed(directories)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty"):
        export_xlora(mixture, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_export_that_fails_leaves_nothing(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mixture = composed(directories)

    def full(*args: object, **options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(import_module("molora.compose.xlora"), "save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written: no space left"):
        export_xlora(mixture, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

"""Names of kohya's scripts and of diffusers: the same expert as under peft's names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_adapters import TENSORS, save_adapter
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor

from molora.errors import CheckpointError
from molora.io.adapter import Adapter
from molora.io.formats import read_kohya
from molora.io.peft_adapter import read_adapter

MODULES = [name for name, _ in tiny("llama").named_modules()]
PEFT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
PARTS = {"A": "down", "B": "up"}
NAMES: dict[str, Callable[[str, str], str]] = {
    "kohya": lambda path, part: f"lora_te1_{path.replace('.', '_')}.lora_{part}.weight",
    "kohya, dotted": lambda path, part: f"{path}.lora_{part}.weight",
    "flat without prefix": lambda path, part: f"{path.replace('.', '_')}.lora_{part}.weight",
    "diffusers": lambda path, part: f"text_encoder.{path}.lora.{part}.weight",
    "diffusers, linear": lambda path, part: f"{path}.lora_linear_layer.{part}.weight",
    "diffusers, processors": lambda path, part: f"unet.{path}_lora.{part}.weight",
}


def _saved(directory: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """What peft saved of rank 3 and alpha 5, read and as it is."""
    save_adapter(directory, target_modules=["q_proj", "down_proj"])
    return read_adapter(directory), load_file(directory / TENSORS)


def _renamed(
    tensors: dict[str, Tensor], name: Callable[[str, str], str], *, alpha: float | None = 5.0
) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in tensors.items():
        found = PEFT.fullmatch(key)
        assert found is not None
        renamed[name(found[1], PARTS[found[2]])] = tensor
        if alpha is not None:
            stem = name(found[1], "down").removesuffix(".lora_down.weight")
            renamed[f"{stem}.alpha"] = torch.tensor(alpha)
    return renamed


@pytest.mark.parametrize("kind", NAMES)
def test_the_expert_is_that_under_the_names_of_peft(tmp_path: Path, kind: str) -> None:
    expected, tensors = _saved(tmp_path)
    has_alpha = "diffusers" not in kind
    file = tmp_path / "lora.safetensors"
    save_file(_renamed(tensors, NAMES[kind], alpha=5.0 if has_alpha else None), file)
    found = read_kohya(file, modules=MODULES)
    assert found.modules.keys() == expected.modules.keys()
    assert not found.notes
    for name, module in found.modules.items():
        assert torch.equal(module.lora_A, expected.modules[name].lora_A)
        assert torch.equal(module.lora_B, expected.modules[name].lora_B)
        assert module.scaling == (5 / 3 if has_alpha else 1)
        wanted = expected.modules[name].update_norm * (1 if has_alpha else 3 / 5)
        assert module.update_norm == pytest.approx(wanted)


def test_processors_are_left_out_of_names(tmp_path: Path) -> None:
    tensors = {
        "unet.mid.attn1.processor.to_q_lora.down.weight": torch.randn(2, 4),
        "unet.mid.attn1.processor.to_q_lora.up.weight": torch.randn(5, 2),
    }
    save_file(tensors, tmp_path / "a")
    found = read_kohya(tmp_path / "a", modules=["mid.attn1.to_q", "mid.attn1"])
    assert list(found.modules) == ["mid.attn1.to_q"]


def test_of_several_models_one_is_chosen(tmp_path: Path) -> None:
    expected, tensors = _saved(tmp_path)
    ours = _renamed(tensors, NAMES["kohya"])
    theirs = {name.replace("te1", "unet"): tensor.clone() for name, tensor in ours.items()}
    save_file(ours | theirs, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"adapts several models.* Give one of their"):
        read_kohya(tmp_path / "a", modules=MODULES)
    found = read_kohya(tmp_path / "a", modules=MODULES, prefix="lora_te1")
    assert found.modules.keys() == expected.modules.keys()
    assert "left out, of another prefix: lora_unet_" in found.notes[0]
    with pytest.raises(CheckpointError, match="none of the prefix 'lora_x'"):
        read_kohya(tmp_path / "a", modules=MODULES, prefix="lora_x")


def test_a_name_that_may_mean_two_modules_is_refused(tmp_path: Path) -> None:
    tensors = {
        "lora_te_a_b.lora_down.weight": torch.randn(2, 4),
        "lora_te_a_b.lora_up.weight": torch.randn(5, 2),
    }
    save_file(tensors, tmp_path / "a")
    assert list(read_kohya(tmp_path / "a", modules=["a.b"]).modules) == ["a.b"]
    with pytest.raises(CheckpointError, match=r"may mean a\.b, a_b|may mean a_b, a\.b"):
        read_kohya(tmp_path / "a", modules=["a.b", "a_b"])


STEM = "lora_te1_model_layers_0_self_attn_q_proj"
EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "other base": (lambda t: t.update({"lora_te1_x.alpha": torch.tensor(1.0)}), "means no module"),
    "LoHa": (lambda t: t.update({f"{STEM}.hada_w1_a": torch.ones(2)}), "LoHa, LoKr"),
    "DoRA": (lambda t: t.update({f"{STEM}.dora_scale": torch.ones(2)}), "is no part of LoRA"),
    "half": (lambda t: t.pop(f"{STEM}.lora_up.weight"), "has only"),
    "alpha alone": (
        lambda t: [t.pop(f"{STEM}.lora_{part}.weight") for part in ("up", "down")],
        "has only alpha",
    ),
    "twice": (
        lambda t: t.update(
            {"lora_te1_model.layers.0.self_attn.q_proj.lora_up.weight": torch.ones(48, 3)}
        ),
        "are the same part|adapts several models",
    ),
    "convolution": (
        lambda t: t.update({f"{STEM}.lora_down.weight": torch.ones(3, 32, 1, 1)}),
        "Convolutions",
    ),
    "scalar": (lambda t: t.update({f"{STEM}.lora_down.weight": torch.tensor(1.0)}), "float32"),
    "ranks": (lambda t: t.update({f"{STEM}.lora_down.weight": torch.ones(2, 32)}), "2 rows"),
    "alphas": (lambda t: t.update({f"{STEM}.alpha": torch.ones(2)}), "is no number"),
    "alpha": (lambda t: t.update({f"{STEM}.alpha": torch.tensor(float("nan"))}), "is no number"),
    "large": (lambda t: t.update({f"{STEM}.alpha": torch.tensor(1e10)}), "is no number"),
    "NaN": (lambda t: t[f"{STEM}.lora_up.weight"].fill_(float("nan")), "NaN or infinity"),
    "nothing": (lambda t: t.clear(), "holds 0 tensors"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_what_is_no_lora_of_this_base_is_refused(tmp_path: Path, kind: str) -> None:
    edit, message = EDITS[kind]
    tensors = _renamed(_saved(tmp_path)[1], NAMES["kohya"])
    edit(tensors)
    save_file(tensors, tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        read_kohya(tmp_path / "a", modules=MODULES)


def test_a_rank_above_the_cap_and_links_are_refused(tmp_path: Path) -> None:
    save_file(_renamed(_saved(tmp_path)[1], NAMES["kohya"]), tmp_path / "a")
    with pytest.raises(CheckpointError, match="at most 2 are loaded"):
        read_kohya(tmp_path / "a", modules=MODULES, max_rank=2)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is no file, or a link"):
        read_kohya(tmp_path / "b", modules=MODULES)
    (tmp_path / "c").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="truncated"):
        read_kohya(tmp_path / "c", modules=MODULES)

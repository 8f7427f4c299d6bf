"""What was saved is what is loaded, bit for bit, elsewhere too (B-19)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_mixtures import logits, read_tensors
from tiny_models import randomize, tiny
from torch import nn

import molora
from molora import presets

PRESETS: dict[str, Callable[[], molora.MixtureConfig]] = {
    "lora": lambda: presets.lora(rank=3),
    "molora": lambda: presets.molora(num_experts=3, rank=2),
    "mola": lambda: presets.mola(num_experts=[3, 5], top_k=2, rank=4),
    "loramoe": lambda: presets.loramoe(num_experts=4, rank=3, targets="all"),
    "mixlora": lambda: presets.mixlora(num_experts=3, top_k=2, rank=4),
    "mixlora_switch": lambda: presets.mixlora(num_experts=3, rank=4, variant="switch"),
    "extras": lambda: presets.mola(
        num_experts=[3, 5], rank=4, train_modules=("lm_head",), train_tokens={"ids": (5, 90)}
    ),
    "bfloat16": lambda: presets.mola(num_experts=3, rank=4, dtype="bfloat16"),
}
SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from saved_mixtures import logits
from tiny_models import tiny
import molora

results = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    model = tiny(directory.name.split("-")[0])
    molora.load(model, directory)
    results[directory.name] = logits(model)
save_file(results, sys.argv[2])
"""


def _adapted(family: str, preset: str) -> tuple[nn.Module, molora.Mixture]:
    """A mixture whose every trainable value differs from what attaching would give."""
    model = tiny(family)
    mixture = molora.attach(model, PRESETS[preset](), seed=3)
    randomize(mixture)
    with torch.no_grad():
        for parameter in mixture.extras.parameters.values():
            parameter.mul_(1.5)
        for parameter in mixture.extras.row_parameters.values():
            parameter[list(mixture.extras.row_ids)] += 1.0
    return model, mixture


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loaded_is_saved_bit_for_bit(family: str, preset: str, tmp_path: Path) -> None:
    model, mixture = _adapted(family, preset)
    mixture.save(tmp_path / "mixture")
    fresh = tiny(family)
    plain = logits(fresh)
    loaded = molora.load(fresh, tmp_path / "mixture")
    assert loaded.config == mixture.config
    assert loaded.state_dict().keys() == mixture.state_dict().keys()
    for name, tensor in mixture.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits(fresh), logits(model))
    assert (logits(fresh) - plain).abs().max() > 1e-2
    assert loaded.num_parameters() == mixture.num_parameters()
    loaded.detach()
    assert torch.equal(logits(fresh), plain)


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path: Path) -> None:
    _, mixture = _adapted("llama", "extras")
    mixture.save(tmp_path / "first")
    molora.load(tiny("llama"), tmp_path / "first").save(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second


def test_the_file_holds_the_state_dict_under_its_names(tmp_path: Path) -> None:
    """Any reader of safetensors sees what `state_dict` gives, trainable values and no others."""
    _, mixture = _adapted("llama", "extras")
    mixture.save(tmp_path / "mixture")
    stored = read_tensors(tmp_path / "mixture")
    assert stored.keys() == mixture.state_dict().keys()
    assert all(torch.equal(stored[name], mixture.state_dict()[name]) for name in stored)
    assert stored["model.embed_tokens.weight.rows"].shape == (2, 32)
    assert "model.embed_tokens.weight" not in stored


def test_tied_extra_modules_are_stored_and_loaded(tmp_path: Path) -> None:
    """Two names of one parameter."""
    config = presets.lora(rank=2, train_modules=("lm_head", "model.embed_tokens"))
    model = tiny("llama", tie_word_embeddings=True)
    mixture = molora.attach(model, config)
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    mixture.save(tmp_path / "mixture")
    fresh = tiny("llama", tie_word_embeddings=True)
    plain = logits(fresh)
    molora.load(fresh, tmp_path / "mixture")
    assert torch.equal(logits(fresh), logits(model))
    assert not torch.equal(logits(fresh), plain)


def test_a_mixture_on_a_half_precision_base_comes_back_in_float32(tmp_path: Path) -> None:
    model = tiny("llama").bfloat16()
    mixture = molora.attach(model, PRESETS["mola"]())
    randomize(mixture)
    mixture.save(tmp_path / "mixture")
    fresh = tiny("llama").bfloat16()
    loaded = molora.load(fresh, tmp_path / "mixture")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(logits(fresh), logits(model))


def test_a_fresh_process_computes_the_same_from_a_moved_directory(tmp_path: Path) -> None:
    expected = {}
    for family in ("llama", "gpt2"):
        for preset in ("lora", "mola", "loramoe", "mixlora", "extras"):
            model, mixture = _adapted(family, preset)
            mixture.save(tmp_path / "here" / f"{family}-{preset}")
            expected[f"{family}-{preset}"] = logits(model)
            mixture.detach()
            assert (logits(model) - expected[f"{family}-{preset}"]).abs().max() > 1e-2
    shutil.move(tmp_path / "here", tmp_path / "there")
    search = os.pathsep.join(str(Path(__file__).parents[i]) for i in (1, 2))
    subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "there", tmp_path / "results"],
        check=True,
        env={**os.environ, "PYTHONPATH": search},
        cwd=tmp_path,
        timeout=120,
    )
    results = load_file(tmp_path / "results")
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name

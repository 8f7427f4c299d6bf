"""Adapters whose start changed the base: with the untouched base they give what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_adapters import edit_config, edit_tensors
from tiny_models import batch_for, tiny
from torch import Tensor, nn

from molora.errors import CheckpointError, ConfigError
from molora.io.adapter import Adapter
from molora.io.peft_adapter import read_adapter
from molora.io.peft_starts import initial_factors

STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa_niter_4": ("llama", {"init_lora_weights": "pissa_niter_4"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "rslora": (
        "llama",
        {
            "init_lora_weights": "olora",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {"v_proj": 9},
        },
    ),
    "conv1d": (
        "gpt2",
        {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "dora": ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
}


def _train(directory: Path, kind: str) -> tuple[nn.Module, Tensor]:
    """What the model with the trained adapter gives; the adapter before and after are saved."""
    family, settings = STARTS[kind]
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **settings}
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(tiny(family), config).eval()
    config.init_lora_weights = True  # as peft's documents advise for the first of the two
    model.save_pretrained(directory / "before")
    config.init_lora_weights = settings["init_lora_weights"]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(directory / "after")
    return model, _logits(model, model.get_base_model())


def _logits(model: nn.Module, base: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch_for(base, labels=False)).logits
    return logits


def _merged(family: str, adapter: Adapter) -> nn.Module:
    """The untouched base with the updates."""
    model = tiny(family)
    for path, module in adapter.modules.items():
        layer = model.get_submodule(path)
        weight_FD = layer.weight.T if adapter.fan_in_fan_out else layer.weight
        updated = weight_FD.data + module.scaling * module.lora_B @ module.lora_A
        if module.magnitude is not None:
            updated *= (module.magnitude / updated.norm(dim=1))[:, None]
        weight_FD.data.copy_(updated)
    return model


def _weights(family: str) -> Callable[[str], Tensor]:
    model = tiny(family)

    def weight(path: str) -> Tensor:
        found: Tensor = model.get_submodule(path).weight
        return found.T if family == "gpt2" else found

    return weight


@pytest.mark.parametrize("kind", STARTS)
def test_with_the_initial_factors_the_untouched_base_gives_what_was_trained(
    tmp_path: Path, kind: str
) -> None:
    family = STARTS[kind][0]
    _, expected = _train(tmp_path, kind)
    adapter = read_adapter(tmp_path / "after", initial=tmp_path / "before")
    ours = _merged(family, adapter)
    torch.testing.assert_close(_logits(ours, ours), expected, atol=1e-4, rtol=1e-4)
    base = tiny(family)
    assert (_logits(base, base) - expected).abs().max() > 1e-2
    assert "twice the rank" in adapter.notes[-1]
    raw = read_adapter(tmp_path / "before")
    for name, module in adapter.modules.items():
        assert module.rank == 2 * raw.modules[name].rank
        update = module.scaling * module.lora_B @ module.lora_A
        torch.testing.assert_close(torch.tensor(module.update_norm), update.norm())


@pytest.mark.parametrize("kind", ["pissa", "olora", "rslora", "conv1d", "dora"])
def test_the_initial_factors_follow_from_the_untouched_weight(tmp_path: Path, kind: str) -> None:
    family = STARTS[kind][0]
    _, expected = _train(tmp_path, kind)
    adapter = read_adapter(tmp_path / "after", base_weight=_weights(family))
    ours = _merged(family, adapter)
    torch.testing.assert_close(_logits(ours, ours), expected, atol=1e-4, rtol=1e-4)
    saved = read_adapter(tmp_path / "after", initial=tmp_path / "before")
    for name, module in adapter.modules.items():
        other = saved.modules[name]
        ours_added = module.lora_B @ module.lora_A
        torch.testing.assert_close(ours_added, other.lora_B @ other.lora_A, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4"])
def test_without_what_the_factors_follow_from_it_is_refused(tmp_path: Path, kind: str) -> None:
    _train(tmp_path, kind)
    remedy = "base_weight=, from which they follow" if kind == "pissa" else "training; or save"
    with pytest.raises(ConfigError, match=f"init_lora_weights is '{kind}': .* initial=.*{remedy}"):
        read_adapter(tmp_path / "after")
    if kind != "pissa":
        with pytest.raises(ConfigError, match="init_lora_weights"):
            read_adapter(tmp_path / "after", base_weight=_weights("llama"))


def test_an_adapter_that_left_the_base_alone_needs_nothing(tmp_path: Path) -> None:
    _train(tmp_path, "olora")
    edit_config(tmp_path / "after", init_lora_weights=True)
    plain = read_adapter(tmp_path / "after", initial=tmp_path / "before")
    assert {module.rank for module in plain.modules.values()} == {3}


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
OTHERS: dict[str, Callable[[Path], object]] = {
    "modules": lambda d: edit_tensors(
        d, lambda t: [t.pop(f"{Q0}.lora_{factor}.weight") for factor in "AB"]
    ),
    "scaling": lambda d: edit_config(d, lora_alpha=6),
    "rank": lambda d: (
        edit_tensors(
            d, lambda t: t.update({n: x[:2] if "A" in n else x[:, :2] for n, x in t.items()})
        ),
        edit_config(d, r=2, lora_alpha=10 / 3),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_initial_factors_of_another_adapter_are_refused(tmp_path: Path, kind: str) -> None:
    _train(tmp_path, "olora")
    OTHERS[kind](tmp_path / "before")
    with pytest.raises(CheckpointError, match=r"has no initial factors of .* differ at model"):
        read_adapter(tmp_path / "after", initial=tmp_path / "before")


def test_a_weight_of_another_base_is_refused(tmp_path: Path) -> None:
    _train(tmp_path, "olora")
    with pytest.raises(CheckpointError, match=r"is \[48, 31\], .* for \[48, 32\]: \(out, in\)"):
        read_adapter(tmp_path / "after", base_weight=lambda _: torch.randn(48, 31))


def test_factors_that_do_not_follow_from_the_weight_are_refused() -> None:
    with pytest.raises(ConfigError, match="the factors of corda cannot be computed"):
        initial_factors("corda", torch.randn(5, 4), 2, 1.0)
    with pytest.raises(ConfigError, match="PiSSA divides by the scaling"):
        initial_factors("pissa", torch.randn(5, 4), 2, 0.0)

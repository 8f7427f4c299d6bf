"""Sets of adapters that package peft saved, and what mixtures of them compute, written densely."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft_adapters import save_adapter
from tiny_models import batch_for, tiny
from torch import Tensor, nn

import molora
from molora.compose.experts import FrozenExperts

Gates = Callable[[str, Tensor], Tensor]
"""(linear, its input (..., in)) → (..., E)."""

PLAIN: dict[str, dict[str, Any]] = {"math": {}, "code": {}, "law": {}}
RAGGED: dict[str, dict[str, Any]] = {
    "math": {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "code": {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "law": {
        "r": 3,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "art": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2, "down_proj": 7},
        "alpha_pattern": {"q_proj": 9},
    },
}
"""Other ranks, scalings, linears and layers; in another order in the banks than in the set."""


def save_set(
    root: Path, settings: Mapping[str, dict[str, Any]] = PLAIN, family: str = "llama"
) -> dict[str, Path]:
    """One directory for each expert, of random values."""
    for seed, (name, given) in enumerate(settings.items(), start=1):
        save_adapter(root / name, family, seed=seed, **given)
    return {name: root / name for name in settings}


def load_set(
    root: Path, settings: Mapping[str, dict[str, Any]] = PLAIN, family: str = "llama"
) -> FrozenExperts:
    return molora.load_experts(save_set(root, settings, family))


def logits(model: nn.Module, **batch: Tensor) -> Tensor:
    """Of a fixed ragged batch, if none is given."""
    with torch.no_grad():
        out: Tensor = model(**(batch or batch_for(model, labels=False))).logits
    return out


def update(layer: nn.Module, adapter: Any, path: str, x: Tensor) -> Tensor:
    """What one adapter alone adds to the output of a base's linear."""
    module = adapter.modules[path]
    added = module.scaling * (x @ module.lora_A.to(x).T @ module.lora_B.to(x).T)
    if module.bias is not None:
        added = added + module.scaling * module.bias.to(x)
    if module.magnitude is not None:
        weight_FD = layer.weight.T if adapter.fan_in_fan_out else layer.weight
        rows = weight_FD + module.scaling * module.lora_B.to(x) @ module.lora_A.to(x)
        c_F = module.magnitude.to(x) / rows.norm(dim=1)
        added = (c_F - 1) * (x @ weight_FD.T) + c_F * added
    return added


def by_hand(experts: FrozenExperts, gates: Gates, family: str = "llama", **batch: Tensor) -> Tensor:
    """Logits of the base with Σ_e gate_e · update_e at every linear, in float64."""
    model = tiny(family).double()

    def adapted(layer: nn.Module, inputs: Any, out: Tensor, path: str) -> Tensor:
        x = inputs[0]
        gates_E = gates(path, x).to(x)
        for number, adapter in enumerate(experts.adapters.values()):
            if path in adapter.modules:
                out = out + gates_E[..., number, None] * update(layer, adapter, path, x)
        return out

    for path in experts.modules:
        model.get_submodule(path).register_forward_hook(
            lambda layer, inputs, out, path=path: adapted(layer, inputs, out, path)
        )
    return logits(model, **batch).float()


def constant(*values: float) -> Gates:
    """The same gates everywhere."""
    return lambda path, x: torch.tensor(values).expand(*x.shape[:-1], -1)

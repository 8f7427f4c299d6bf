"""X-LoRA models of molora and of package peft over the same adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft_adapters import save_adapter
from tiny_models import tiny
from torch import Tensor, nn

import molora

NAMES = ("math", "code", "law")
IDS = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0

# ours, and the same in package peft
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "layerwise": (
        {"layerwise": True, "depth": 2, "width": 16},
        {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16},
    ),
    "depth 3 without dropout": (
        {"depth": 3, "width": 8, "dropout": 0.0, "temperature": 0.5},
        {"xlora_depth": 3, "xlora_size": 8, "xlora_dropout_p": 0.0, "softmax_temperature": 0.5},
    ),
    "two softmaxes": (
        {"layerwise": True, "top_k": 2, "softmax_top_k": True},
        {"layerwise_scalings": True, "top_k_lora": 2, "enable_softmax_topk": True},
    ),
    "softmax of a softmax over all": ({"softmax_top_k": True}, {"enable_softmax_topk": True}),
    "top 2 as they are, first pass with experts": (
        {"top_k": 2, "first_pass_score": 0.3, "gate_scale": 1.5},
        {"top_k_lora": 2, "scaling_pass_value": 0.3, "global_scaling_weight": 1.5},
    ),
    "raw, first pass with the mean": (
        {"softmax": False, "first_pass_score": None},
        {"enable_softmax": False, "scaling_pass_value": 1 / 3},
    ),
}


def write_directories(root: Path) -> dict[str, Path]:
    """Three adapters of unlike ranks, the last without a linear that the others adapt."""
    for number, name in enumerate(NAMES):
        targets = ["q_proj", "v_proj", "down_proj"][: 3 - (number == 2)]
        save_adapter(root / name, seed=number + 1, r=3 + number, target_modules=targets)
    return {name: root / name for name in NAMES}


def composed(directories: dict[str, Path], **options: Any) -> tuple[nn.Module, molora.Mixture]:
    model = tiny("llama").eval()
    router = {"kind": "xlora", "width": 16, **options}
    return model, molora.compose(model, molora.load_experts(directories), router=router)


def peft_model(directories: dict[str, Path], **options: Any) -> nn.Module:
    model = tiny("llama").eval().requires_grad_(False)
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        # any other names than these raise a KeyError in peft 0.21.2
        adapters={str(n): str(path) for n, path in enumerate(directories.values())},
        **options,
    )
    return peft.get_peft_model(model, config).eval()


def set_classifier(
    mixture: molora.Mixture, other: nn.Module | None = None, *, seed: int = 3
) -> None:
    """Large random values, the same in package peft's."""
    theirs = {} if other is None else other.base_model.internal_xlora_classifier.state_dict()
    source = torch.Generator().manual_seed(seed)
    for name, tensor in mixture.state_dict().items():
        if name.startswith("router."):
            tensor.normal_(0, 0.3, generator=source)
            if other is not None:
                theirs.pop(name.removeprefix("router.")).copy_(tensor)
    assert not theirs


def logits(model: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, attention_mask=MASK, **arguments).logits
    return found[MASK.bool()]

"""Three unlike LoRAs of package peft in directories, for a base that lies in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM

UNLIKE: dict[str, dict[str, Any]] = {
    "math": {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    "code": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    "law": {"r": 5, "use_rslora": True, "target_modules": ["q_proj"]},
}
"""Of other ranks, scalings and linears."""


def save_experts(
    directory: Path, base: Path, kinds: dict[str, dict[str, Any]] | None = None
) -> dict[str, Path]:
    """Name → directory of a LoRA with random values."""
    found = {}
    for seed, (name, settings) in enumerate((kinds or UNLIKE).items()):
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            adapted = peft.get_peft_model(model, peft.LoraConfig(**{"lora_alpha": 5, **settings}))
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:  # they start at zero
                    nn.init.normal_(parameter, std=0.3)
                elif "lora_magnitude_vector" in key:
                    parameter.data.mul_(0.5 + torch.rand_like(parameter))
        adapted.save_pretrained(directory / name)
        found[name] = directory / name
    return found

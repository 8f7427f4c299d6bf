"""Adapters that package peft makes on tiny models, to read, to compare with and to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor, nn

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def save_adapter(
    directory: Path, family: str = "llama", *, seed: int = 0, **settings: Any
) -> nn.Module:
    """A LoRA of random values on `tiny(family)`, saved; the model of package peft with it."""
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **settings}
    model = peft.get_peft_model(tiny(family), peft.LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they start at zero
            nn.init.normal_(parameter, std=0.3)
        elif "lora_magnitude_vector" in name:
            parameter.data.mul_(0.5 + torch.rand_like(parameter))
    model.save_pretrained(directory)
    return model


def edit_config(directory: Path, **settings: Any) -> None:
    """Change settings in the file, as a damaged or hostile one could have them."""
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors in the file."""
    tensors = load_file(directory / TENSORS)
    edit(tensors)
    (directory / TENSORS).unlink()
    # clones: what shares memory cannot be saved
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, directory / TENSORS)

"""Training checkpoints with values that follow from their step, and a check that they are exact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import molora
from molora import io

BASE = io.BaseFingerprint(name="tiny", config_sha256={}, weights_sha256={})
CONFIG = molora.presets.mola(num_experts=3, top_k=2, rank=4)
ALL = ["float64", "float32", "bfloat16", "float16"]
ALL += ["int64", "int32", "int16", "int8", "uint8", "bool"]
"""dtypes that are stored."""


def random_tensor(dtype: str, shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    """Any bits, NaN and infinities of every kind included; bool is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    kind: torch.dtype = getattr(torch, dtype)
    shape_bytes = (*shape, kind.itemsize)
    high = 2 if dtype == "bool" else 256
    values = torch.randint(0, high, shape_bytes, dtype=torch.uint8, generator=generator)
    return values.view(kind).reshape(shape)


def trainer_tensors(step: int) -> dict[str, Tensor]:
    """One of every dtype and a scalar; two steps share no value that matters."""
    tensors = {f"moments.{d}": random_tensor(d, (5, 3), seed=step) for d in ALL}
    return {**tensors, "step": torch.tensor(step)}


def mixture_tensors(step: int) -> dict[str, Tensor]:
    """What `molora.io.write` stores: knows no model."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(3, 4, 7, generator=generator) for name in ("lora_A", "lora_B")}


def trainer_state(step: int) -> dict[str, Any]:
    """JSON of some depth."""
    return {"global_step": step, "log_history": [{"loss": 1 / step, "step": step}], "best": None}


def save_checkpoint(output_dir: Path, step: int) -> Path:
    """A complete checkpoint of 2 processes under ZeRO-3, as a training run writes it."""
    directory = io.checkpoint_directory(output_dir, step)
    io.write(
        directory, state=mixture_tensors(step), mixture=CONFIG, base=BASE, molora_version="0.1.0"
    )
    io.write_checkpoint(
        directory,
        step=step,
        world_size=2,
        stage=3,
        tensors=trainer_tensors(step),
        state=trainer_state(step),
        files=[io.MANIFEST, io.read_manifest(directory).tensors_file],
    )
    return directory


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Names, dtypes, shapes and every bit; NaN equals itself, 0.0 is not -0.0."""
    return first.keys() == second.keys() and all(
        (value.dtype, value.shape) == (second[name].dtype, second[name].shape)
        and torch.equal(_bits(value), _bits(second[name]))
        for name, value in first.items()
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def is_exact(found: io.Checkpoint) -> bool:
    """Whether it holds what `save_checkpoint` of its step saved, the mixture included."""
    mixture = io.read_tensors(found.directory, io.read_manifest(found.directory))
    return (
        (found.world_size, found.stage) == (2, 3)
        and found.state == trainer_state(found.step)
        and same_bits(found.tensors(), trainer_tensors(found.step))
        and same_bits(mixture, mixture_tensors(found.step))
    )


def steps_of(output_dir: Path) -> list[int]:
    """Of the complete checkpoints."""
    return [found.step for found in io.complete_checkpoints(output_dir)[0]]


def copy(directory: Path, to: Path) -> Path:
    """Everything in a directory, to damage it."""
    return shutil.copytree(directory, to, symlinks=True)

"""Ranks of `test_zero_loading.py`: what ZeRO-3 leaves of a base that it divides while it is read,
and of a mixture on it. Writes what each rank found to DIRECTORY/rank-N.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from tiny_models import randomize, tiny
from torch import nn

import molora
from molora.attach.saving import base_fingerprint, load_values
from molora.config.run import ModelConfig
from molora.train.gather import gathered, gathered_state
from molora.train.loading import load_model

ENGINE = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
PRESETS = {
    "mola": {"num_experts": 4, "rank": 3},
    "mixlora": {"num_experts": 4, "rank": 3},
    "lora": {"rank": 4, "alpha": 7.1},
}


def shapes(model: nn.Module) -> list[list[int]]:
    return sorted({tuple(p.shape) for p in model.parameters()})


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(
        state[name].dtype == other[name].dtype and torch.equal(state[name], other[name])
        for name in state
    )


def inside_zero_init() -> Iterator[tuple[str, Any]]:
    """Models and mixtures made inside the context, against those made without it."""
    for name, arguments in PRESETS.items():
        config = getattr(molora.presets, name)(**arguments)
        plain = molora.attach(tiny("llama", pad_token_id=None), config, seed=3)
        with deepspeed.zero.Init(config_dict_or_path=ENGINE):
            model = tiny("llama", pad_token_id=None)
            mixture = molora.attach(model, config, seed=3)
        other_seed = molora.attach(tiny("llama", pad_token_id=None), config, seed=4)
        state = gathered_state(mixture, rank0_only=False)
        banks = zip(plain.built.banks.values(), mixture.built.banks.values(), strict=True)
        yield (
            name,
            {
                "shapes": shapes(model),
                "start": same(state, plain.state_dict()),
                "start of another seed": same(state, other_seed.state_dict()),
                "scaling": all(torch.equal(a.scaling, b.scaling) for a, b in banks),
                "counts": mixture.num_parameters() == plain.num_parameters(),
            },
        )


def refused_inside() -> str:
    """What attaching says inside a context that casts."""
    casting = {**ENGINE, "bf16": {"enabled": True}}
    with deepspeed.zero.Init(config_dict_or_path=casting):
        model = tiny("llama", pad_token_id=None)
        try:
            molora.attach(model, molora.presets.mola(num_experts=4))
        except molora.AttachError as error:
            return str(error)
    return "nothing"


def loaded(base: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Bases read under ZeRO-3, against those read whole."""
    config = molora.presets.mola(num_experts=4, rank=3, train_modules=("lm_head",))
    for dtype in ("bfloat16", "float32", "auto"):
        settings = ModelConfig(name=base, dtype=dtype)  # type: ignore[arg-type]
        whole, divided = load_model(settings), load_model(settings, engine=ENGINE)
        found = {
            "shapes": shapes(divided),
            "dtype": str(divided.dtype),
            "dtypes": [p.dtype for p in whole.parameters()]
            == [p.dtype for p in divided.parameters()],
            "buffers": [b.dtype for b in whole.buffers()] == [b.dtype for b in divided.buffers()],
        }
        a, b = molora.attach(whole, config, seed=1), molora.attach(divided, config, seed=2)
        fingerprints = base_fingerprint(a), base_fingerprint(b, gather=gathered)
        found["fingerprint"] = fingerprints[0] == fingerprints[1]
        found["samples"] = len(fingerprints[1].weights_sha256)
        found["samples without gathering"] = len(base_fingerprint(b).weights_sha256)
        randomize(a)
        if dist.get_rank() == 0:
            a.save(folder / dtype)
        dist.barrier()
        with gathered(b.extras.trainable(), modifier_rank=0):
            load_values(b, folder / dtype, gather=gathered)
        found["values"] = same(gathered_state(b, rank0_only=False), a.state_dict())
        found["still divided"] = all(list(s) == [0] for s in shapes(divided) if len(s) == 1)
        yield dtype, found


def main(base: str, directory: str) -> None:
    deepspeed.init_distributed("gloo")
    found = {
        "inside": dict(inside_zero_init()),
        "refused": refused_inside(),
        "loaded": dict(loaded(base, Path(directory))),
    }
    text = json.dumps(found)
    (Path(directory) / f"rank-{dist.get_rank()}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

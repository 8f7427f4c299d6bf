"""One optimiser step on packed rows under every engine, compared with one process that gives every
sequence a row; started on two ranks by test_packing.py. Usage: packed_ranks.py RESULTS.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from datasets import Dataset
from distributed_engines import Engine
from tiny_models import randomize, sequences, tiny
from torch import Tensor

import molora
from molora.config import LoadBalance, Loss, RouterZ
from molora.data import Collator, pack
from molora.train.gather import gathered_state

LENGTHS = ((11, 5, 9, 3), (12, 4, 8, 6, 7))
LOSSES = (
    Loss(term=LoadBalance(form="switch"), coefficient=0.5),
    Loss(term=RouterZ(), coefficient=0.1),
)
OPTIONS: dict[str, Any] = {"rank": 4, "dropout": 0.0}
CONFIGS = {
    "mola": molora.presets.mola(num_experts=4, losses=LOSSES, **OPTIONS),
    "loramoe": molora.presets.loramoe(num_experts=4, **OPTIONS),
    "mixlora-switch": molora.presets.mixlora(
        num_experts=3, variant="switch", capacity=2, losses=LOSSES, **OPTIONS
    ),
}


def main(results: str) -> None:
    deepspeed.init_distributed("gloo")
    found = {}
    for name, config in CONFIGS.items():
        expected, before = _one_process(config)
        for engine in ("ddp", "zero2", "zero3"):
            state = _several(engine, config)
            error = max(float((state[n] - expected[n]).abs().max()) for n in expected)
            moved = max(float((before[n] - expected[n]).abs().max()) for n in expected)
            largest = torch.tensor([error, moved])
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            found[f"{engine}/{name}"] = dict(zip(("error", "moved"), largest.tolist(), strict=True))
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


def _rows(rank: int) -> Dataset:
    ids = [row.tolist() for row in sequences(LENGTHS[rank], seed=rank)]
    types = [n % 2 for n in range(len(ids))]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "task_types": types})


def _adapted(config: molora.MixtureConfig) -> molora.Mixture:
    mixture = molora.attach(tiny("llama"), config)
    randomize(mixture)
    for site in mixture.built.sites.values():
        site.router.jitter = 0.0
    mixture.model.train()
    return mixture


def _items() -> int:
    return sum(length - 1 for lengths in LENGTHS for length in lengths)


def _one_process(config: molora.MixtureConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mixture = _adapted(config)
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    optimiser = torch.optim.SGD(mixture.parameter_groups(0.5), lr=0.5)
    for rank in range(2):
        batch = Collator(0)(list(_rows(rank)))
        mixture.model(**batch, num_items_in_batch=_items()).loss.backward()
    optimiser.step()
    return mixture.state_dict(), before


def _several(name: str, config: molora.MixtureConfig) -> dict[str, Tensor]:
    mixture = _adapted(config)
    engine = Engine(name, mixture.model)
    batch = Collator(0)(list(pack(_rows(dist.get_rank()), 20)))
    assert "segment_ids" in batch
    engine.backward(engine.wrapped(**batch, num_items_in_batch=_items()).loss)
    engine.step()
    if name == "zero3":
        assert engine.is_partitioned()
    state = {n: t.clone() for n, t in gathered_state(mixture, rank0_only=False).items()}
    engine.close()
    return state


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The gradient of eight rows, cut up over two ranks and their micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from distributed_engines import Engine
from distributed_scenarios import (
    OPTIMISERS,
    Scenario,
    adapted,
    base_model,
    differences,
    linear,
    snapshot,
)
from tiny_models import batch_for
from torch import Tensor

from molora.train.gather import gathered_state

LENGTHS = {"ragged": (9, 4, 6, 3, 8, 5, 7, 4), "same": (7,) * 8}
LAYOUTS = {"2x1x4": 1, "2x2x2": 2, "2x4x1": 4}
"""Ranks × micro-batches × rows → micro-batches of a rank."""

Batch = dict[str, Tensor]
State = dict[str, Tensor]


def compare(directory: Path, *engines: str) -> dict[str, Any]:
    """For each engine and layout the errors against one process, and how far the weights moved."""
    aux = Scenario(linear(targets=["q_proj", "down_proj"]))
    task = replace(aux, config=aux.config.model_copy(update={"losses": ()}))
    start = snapshot(adapted(aux))
    of_task = _one_process(task, start, _parts("ragged", 1))
    of_same = _one_process(aux, start, _parts("same", 1))
    found: dict[str, Any] = {}
    for layout, count in LAYOUTS.items():
        ragged, same = _parts("ragged", 2 * count), _parts("same", 2 * count)
        shares = _one_process(aux, start, ragged)
        uncounted = [{n: t for n, t in p.items() if n != "num_items_in_batch"} for p in ragged]
        for engine in engines:
            ends = {
                "task": (_two_processes(engine, task, start, ragged), of_task),
                "same": (_two_processes(engine, aux, start, same), of_same),
                "shares": (_two_processes(engine, aux, start, ragged), shares),
                "uncounted": (_two_processes(engine, aux, start, uncounted), shares),
                "aux": (of_task, shares),
            }
            errors = {name: max(differences(*pair).values()) for name, pair in ends.items()}
            moved = min(differences(start, shares).values())
            found[f"{engine}/{layout}"] = {**errors, "moved": moved}
    return found


def _parts(name: str, number: int) -> list[Batch]:
    """Eight rows as micro-batches, each of which counts the supervised tokens of all."""
    every = batch_for(base_model(Scenario(linear())), LENGTHS[name], seed=5)
    if name == "same":
        every = {n: t[:1].expand(8, -1) for n, t in every.items()}
    every["labels"] = every["labels"].masked_fill(every["attention_mask"] == 0, -100)
    total = (every["labels"][:, 1:] != -100).sum()
    return [
        {**{n: t[i::number] for n, t in every.items()}, "num_items_in_batch": total}
        for i in range(number)
    ]


def _one_process(scenario: Scenario, start: State, parts: Sequence[Batch]) -> State:
    mixture = adapted(scenario, start)
    optimiser = OPTIMISERS["sgd"]([p for p in mixture.model.parameters() if p.requires_grad])
    for part in parts:
        mixture.model(**part).loss.backward()
    optimiser.step()
    return snapshot(mixture)


def _two_processes(name: str, scenario: Scenario, start: State, parts: Sequence[Batch]) -> State:
    mixture = adapted(scenario, start)
    own = parts[dist.get_rank() :: 2]
    engine = Engine(name, mixture.model, accumulate=len(own))
    for number, part in enumerate(own, start=1):
        last = number == len(own)
        waits = name == "ddp" and not last
        with engine.wrapped.no_sync() if waits else contextlib.nullcontext():
            engine.backward(engine.wrapped(**part).loss)
        if last or name != "ddp":  # DeepSpeed counts the micro-batches itself
            engine.step()
    state = gathered_state(mixture, rank0_only=False)
    engine.close()
    return state

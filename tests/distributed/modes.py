"""What a mixture can do besides a training step, under ZeRO-3: before the first step, when nothing
was gathered yet, and between steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from distributed_engines import Engine, settings
from distributed_scenarios import (
    OPTIMISERS,
    SCENARIOS,
    adapted,
    base_model,
    batches,
    differences,
    seeded,
    snapshot,
)
from tiny_models import tiny
from torch import Tensor

import molora
from molora.train.gather import gathered, gathered_state

STEPS = 3


def compare(directory: Path, name: str, engine_name: str) -> dict[str, Any]:
    """Everything on one process and on two, between the same steps; the largest errors."""
    scenario = SCENARIOS[name]
    one = adapted(scenario)
    start = snapshot(one)
    optimiser = OPTIMISERS["slow"]([p for p in one.model.parameters() if p.requires_grad])
    two = adapted(scenario, start)
    engine = Engine(engine_name, two.model, optimiser="slow")
    rank, found = dist.get_rank(), []
    for step in range(STEPS):
        by_rank = batches(scenario, one.model, seed=step)
        found.append(_differences(_modes(one, by_rank[rank]), _modes(two, by_rank[rank])))
        found[-1]["partitioned"] = engine.is_partitioned()
        for other, batch in enumerate(by_rank):
            with seeded(other):
                one.model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with seeded(rank):
            engine.backward(engine.wrapped(**by_rank[rank]).loss)
        engine.step()
        state = gathered_state(two, rank0_only=False)
        found[-1]["step"] = max(differences(state, one.state_dict()).values())
    counts = [one.num_parameters(), two.num_parameters()]
    engine.close()
    return {"modes": found, "counts": counts}


@torch.no_grad()
def _modes(mixture: molora.Mixture, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Calls of the model itself, not of the engine."""
    model = mixture.model.eval()
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    with mixture.record() as records, mixture.statistics() as statistics:
        logits = model(**inputs).logits
    with mixture.disabled():
        base = model(**inputs).logits
    prompt = {n: t[:1, :3] for n, t in inputs.items()}
    # rank 1 wants more tokens: rank 0 goes on with it, since ZeRO-3 needs all ranks in a forward
    wanted = 4 + 3 * dist.get_rank()
    tokens = model.generate(
        **prompt, max_new_tokens=wanted, do_sample=False, use_cache=True, synced_gpus=True
    )
    model.train()
    zero = torch.zeros(1)  # a plain LoRA has no routers
    return {
        "logits": logits,
        "base": base,
        "tokens": tokens,
        "gates": torch.cat([zero, *(r.dense_gates().flatten() for r in _single(records))]),
        "counts": torch.cat([zero, *(c.flatten() for c in statistics.counts().values())]),
    }


def _single(records: dict[str, Any]) -> list[molora.Routing]:
    return [record for record in records.values() if isinstance(record, molora.Routing)]


def _differences(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: float((one[name].double() - two[name].double()).abs().max())
        for name in ("logits", "base", "gates", "counts")
    }
    found["adapted"] = float((one["logits"] - one["base"]).abs().max())
    found["tokens"] = torch.equal(one["tokens"], two["tokens"])
    found["length"] = one["tokens"].shape[1]
    return found


def refusals(directory: Path) -> dict[str, str]:
    """What is said to callers who did not gather, and what helps."""
    mixture = adapted(SCENARIOS["extras"])
    start = snapshot(mixture)
    engine = Engine("zero3", mixture.model)
    actions = {
        "save": lambda: mixture.save(directory / f"refused-{dist.get_rank()}"),
        "load": lambda: mixture.load_state_dict(start),
        "detach": mixture.detach,
    }
    said = {}
    for name, action in actions.items():
        try:
            action()
        except molora.MoLoRAError as error:
            said[name] = str(error)
    changed = {name: tensor + 1 for name, tensor in start.items()}
    parameters = [p for _, p in mixture.named_parameters()]
    with gathered(parameters, modifier_rank=0):
        if dist.get_rank() == 0:
            mixture.load_state_dict(changed)
    found = gathered_state(mixture, rank0_only=False)
    said["loaded"] = str(max(differences(found, changed).values()))
    engine.close()
    return said


def zero_init(directory: Path) -> dict[str, Any]:
    """A step of a mixture on a model that was made in parts, under zero.Init."""
    # the initialiser of transformers reads the row of a padding token
    scenario = replace(SCENARIOS["mola"], settings={"pad_token_id": None})
    whole = base_model(scenario)
    expected = adapted(scenario)
    start = snapshot(expected)
    with deepspeed.zero.Init(config_dict_or_path=settings("zero3")):
        model = tiny(scenario.family, **scenario.settings)
    partitioned = all(p.shape == (0,) for p in model.parameters())
    with gathered(model.parameters(), modifier_rank=0):
        if dist.get_rank() == 0:
            model.load_state_dict(whole.state_dict())
    mixture = adapted(scenario, start, model=model)
    engine = Engine("zero3", model)
    by_rank = batches(scenario, model)
    engine.backward(engine.wrapped(**by_rank[dist.get_rank()]).loss)
    engine.step()
    state = gathered_state(mixture, rank0_only=False)
    engine.close()
    optimiser = OPTIMISERS["sgd"]([p for p in expected.model.parameters() if p.requires_grad])
    for batch in by_rank:
        expected.model(**batch).loss.backward()
    optimiser.step()
    return {
        "partitioned": partitioned,
        "error": max(differences(state, snapshot(expected)).values()),
        "moved": min(differences(start, state).values()),
    }

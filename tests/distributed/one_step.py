"""One optimiser step of every scenario under every engine, compared with one process; started on
two ranks by test_one_step.py. Usage: one_step.py RESULTS.json ENGINE,… SCENARIO,…"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import skipped_experts
import torch
import torch.distributed as dist
from distributed_engines import Engine
from distributed_scenarios import (
    SCENARIOS,
    Scenario,
    Step,
    adapted,
    batches,
    difference,
    differences,
    one_process,
    seeded,
)

import molora
from molora.train.gather import gathered, gathered_state


def main(results: str, engines: str, names: str) -> None:
    deepspeed.init_distributed("gloo")
    gc.freeze()  # DeepSpeed collects garbage once an engine: 0.7 s over all that was imported
    found: dict[str, dict[str, Any]] = {}
    for name in names.split(","):
        scenario = SCENARIOS[name]
        expected = one_process(scenario)
        for engine in engines.split(","):
            found[f"{engine}/{name}"] = _compare(engine, scenario, expected)
    # last, since what this does to an engine is undefined
    for engine in engines.split(","):
        for kind in skipped_experts.KINDS if engine != "ddp" else ():  # DDP finds out, and stops
            figures = skipped_experts.error_of_a_step(engine, kind, dist.get_rank())
            found[f"{engine}/{kind}"] = _largest(figures)
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


def _compare(name: str, scenario: Scenario, expected: Step) -> dict[str, Any]:
    """The largest value over the ranks of every figure."""
    mixture = adapted(scenario, expected.before)
    base = {n: p.detach().clone() for n, p in mixture.model.named_parameters()}
    engine = Engine(name, mixture.model, optimiser=scenario.optimiser)
    partitioned = [engine.is_partitioned()]
    batch = batches(scenario, mixture.model)[dist.get_rank()]
    with mixture.record() as records, seeded(dist.get_rank()):
        out = engine.wrapped(**batch)
    engine.backward(out.loss)
    norm = engine.step()
    partitioned.append(engine.is_partitioned())
    state = gathered_state(mixture, rank0_only=False)
    trained = {id(p) for _, p in mixture.named_parameters()}
    frozen = {n: p for n, p in mixture.model.named_parameters() if id(p) not in trained}
    with gathered(frozen.values()):
        drift = difference(frozen, {n: base[n] for n in frozen})
    engine.close()
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    figures = {
        "error": difference(state, expected.after),
        "base_drift": drift,
        "loss_error": abs(float(loss) - expected.loss),
        "norm_error": abs(norm - expected.grad_norm) / expected.grad_norm,
    }
    if scenario.base_dtype != torch.float32:
        figures |= _rounding(scenario, expected, state)
    moves = differences(expected.before, expected.after)
    stays = {name for name, p in mixture.named_parameters() if not p.requires_grad}
    drifts = differences(expected.before, state)
    return {
        **_largest(figures),
        "smallest_move": min(moves[name] for name in moves if name not in stays),
        "largest_move": max(moves.values()),
        "frozen_move": max((drifts[name] for name in stays), default=0.0),
        "partitioned": all(partitioned),
        "usage": _usage(records),
    }


def _rounding(
    scenario: Scenario, expected: Step, state: dict[str, torch.Tensor]
) -> dict[str, float]:
    """How far both are from the same step in float32."""
    wide = dataclasses.replace(scenario, base_dtype=torch.float32)
    exact = one_process(wide, expected.before).after
    return {
        "error_to_float32": difference(state, exact),
        "expected_to_float32": difference(expected.after, exact),
    }


def _largest(figures: dict[str, float]) -> dict[str, float]:
    values = torch.tensor(list(figures.values()), dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(figures, values.tolist(), strict=True))


def _usage(records: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Site → for each rank, the experts that act on its tokens, in the order of their first one."""
    own: dict[str, list[int]] = {}
    for site, record in records.items():
        assert isinstance(record, molora.Routing)
        acts_TK = (record.gates > 0) & record.valid_rows().bool()[:, None]
        own[site] = list(dict.fromkeys(record.expert_index[acts_TK].tolist()))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {site: [rank[site] for rank in everyone] for site in own}


if __name__ == "__main__":
    main(*sys.argv[1:])

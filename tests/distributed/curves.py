"""Twenty steps of a preset on two ranks against one process, and what is saved at their end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from distributed_engines import Engine
from distributed_scenarios import (
    CURVES,
    OPTIMISERS,
    Scenario,
    adapted,
    batches,
    differences,
    pooled,
    seeded,
    snapshot,
)
from safetensors.torch import save_file
from tiny_models import batch_for
from torch import Tensor, nn

import molora
from molora.attach.saving import base_fingerprint, save_mixture
from molora.train.gather import gathered, gathered_state

STEPS = 20


def compare(directory: Path, preset: str, *engines: str) -> dict[str, Any]:
    """Losses and gradient norms of every step, the states at the end; saves under each engine."""
    scenario = CURVES[preset]
    start, curve, end = _one_process(scenario)
    found: dict[str, Any] = {"one_process": curve}
    for name in engines:
        found[name] = _two_processes(scenario, name, start, end, directory / f"{preset}-{name}")
    return found


def lengths_at(step: int) -> list[list[int]]:
    """Rows of other lengths in every step: as many on every rank, not as many tokens."""
    source = torch.Generator().manual_seed(step)
    return torch.randint(3, 9, (2, 2), generator=source).tolist()


def _batches(scenario: Scenario, model: nn.Module, step: int) -> list[dict[str, Tensor]]:
    # five sets of rows in turn, so that there is something to learn
    return batches(scenario, model, lengths_at(step % 5), seed=step % 5)


def _one_process(
    scenario: Scenario,
) -> tuple[dict[str, Tensor], list[list[float]], dict[str, Tensor]]:
    """Start, (task loss, gradient norm) by step, end.

    Without auxiliary losses of all rows at once, else of the sum of the ranks' forwards.
    """
    mixture = adapted(scenario)
    start, curve = snapshot(mixture), []
    parameters = [p for p in mixture.model.parameters() if p.requires_grad]
    optimiser = OPTIMISERS[scenario.optimiser](parameters)
    for step in range(STEPS):
        by_rank = _batches(scenario, mixture.model, step)
        together = [pooled(by_rank)] if not scenario.config.losses else by_rank
        loss = torch.stack([_forward(mixture, b, step, r) for r, b in enumerate(together)])
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        curve.append([float(loss.sum()), float(norm)])
        optimiser.step()
        optimiser.zero_grad()
    return start, curve, snapshot(mixture)


def _forward(mixture: molora.Mixture, batch: dict[str, Tensor], step: int, rank: int) -> Tensor:
    with mixture.deferred_aux() as deferred, seeded(10 * step + rank):
        loss = mixture.model(**batch).loss
    (loss + deferred.weighted(batch["num_items_in_batch"])).backward()
    return loss.detach()


def _two_processes(
    scenario: Scenario,
    name: str,
    start: dict[str, Tensor],
    end: dict[str, Tensor],
    directory: Path,
) -> dict[str, Any]:
    mixture = adapted(scenario, start)
    engine = Engine(name, mixture.model, optimiser=scenario.optimiser)
    rank, curve, partitioned = dist.get_rank(), [], engine.is_partitioned()
    for step in range(STEPS):
        batch = _batches(scenario, mixture.model, step)[rank]
        with mixture.deferred_aux() as deferred, seeded(10 * step + rank):
            loss = engine.wrapped(**batch).loss
        engine.backward(loss + deferred.weighted(batch["num_items_in_batch"]))
        norm = engine.step()
        partitioned = partitioned and engine.is_partitioned()
        total = loss.detach().clone()
        dist.all_reduce(total)
        curve.append([float(total), norm])
    state = gathered_state(mixture)
    found = {
        "curve": curve,
        "partitioned": partitioned,
        "others_get_nothing": _on_rank_1(state == {}),
        "masters": _differs_from_masters(name, mixture),
        **_saved(engine, mixture, state, directory),
    }
    engine.close()
    if rank == 0:
        found["end_error"] = max(differences(state, end).values())
        found["moved"] = max(differences(start, end).values())
    return found


def _on_rank_1(value: bool) -> bool:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return bool(everyone[1])


def _differs_from_masters(name: str, mixture: molora.Mixture) -> float:
    """Largest difference between what the forward uses and what the optimiser holds."""
    state = gathered_state(mixture, rank0_only=False)
    if name in ("ddp", "zero0"):  # the optimiser has the parameters themselves
        masters = dict(mixture.named_parameters())
    else:
        masters = {n: safe_get_full_fp32_param(p) for n, p in mixture.named_parameters()}
    return max(differences(state, masters).values())


def _saved(
    engine: Engine, mixture: molora.Mixture, state: dict[str, Tensor], directory: Path
) -> dict[str, Any]:
    """Writes what was gathered, and logits of the engine for who reads it."""
    model = mixture.model.eval()
    batch = {n: t for n, t in probe(model).items() if n != "labels"}
    with torch.no_grad():
        logits = engine.wrapped(**batch).logits
    bytes_needed = sum(t.numel() * t.element_size() for t in state.values())
    base = base_fingerprint(mixture, gather=gathered)
    if dist.get_rank() == 0:
        save_mixture(mixture, directory, state=state, base=base)
        save_file({"logits": logits.contiguous()}, directory / "logits.safetensors")
    return {"bytes": bytes_needed}


def probe(model: nn.Module) -> dict[str, Tensor]:
    """A fixed batch."""
    return batch_for(model, (6, 9, 3), seed=99)

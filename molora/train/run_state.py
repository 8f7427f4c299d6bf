"""Where a trainer is, as tensors and JSON: what besides weights and moments an exact resume needs.

Everything of one rank alone, its random generators and its sums since the last line of metrics, is
kept for every rank. What all ranks have in common is kept once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from molora.errors import CheckpointError
from molora.train.rng import rng_state, set_rng_state

# What decides the numbers of the steps to come. Another number of processes, stage, logging or
# saving does not; more steps or epochs are a longer run with a schedule of its own.
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "seed",
    "data_seed",
    "fp16",
    "bf16",
    # of preference training
    "beta",
    "loss_type",
    "disable_dropout",
)


def settings(trainer: Any) -> dict[str, Any]:
    """What has to be the same when a run goes on, by name."""
    args = trainer.args
    return {
        **{name: _plain(getattr(args, name)) for name in _SETTINGS if hasattr(args, name)},
        "batch size (rows · accumulation · processes)": (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        ),
        "training rows": _data(trainer.train_dataset),
        "auxiliary losses": getattr(trainer, "aux_losses", True),
        "mixture": hashlib.sha256(trainer.mixture.config.model_dump_json().encode()).hexdigest(),
    }


def check_settings(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Raise CheckpointError naming every setting that differs from the checkpoint's."""
    differing = [
        f"{name} was {saved[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in saved and saved[name] != value
    ]
    if differing:
        raise CheckpointError(
            f"{where} is of another run, which would not be continued but changed: "
            f"{'; '.join(differing)}. Resume with what it was started with, or start a new run "
            "in another output_dir."
        )


def read_common(trainer: Any) -> dict[str, Any]:
    """What is the same on all ranks, as JSON."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return {
        "settings": settings(trainer),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "learning_rates": [group["lr"] for group in trainer.optimizer.param_groups],
        "groups": _groups(trainer),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "loss_total": trainer._total_loss_scalar,
        "logged_step": trainer._globalstep_last_logged,
        # TRL's own means and counts, which it has gathered from all ranks
        "metrics": {name: list(values) for name, values in _trl_metrics(trainer).items()},
        "metric_tokens": getattr(trainer, "_total_train_tokens", 0),
    }


def write_common(trainer: Any, state: Mapping[str, Any]) -> None:
    """Set what `read_common` read, once optimiser and schedule exist.

    Raises:
        CheckpointError: other learning rates or weight decays.
    """
    for number, (saved, now) in enumerate(zip(state["groups"], _groups(trainer), strict=True)):
        check_settings(saved, now, where=f"group {number} of the optimiser")
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    groups = trainer.optimizer.param_groups
    for group, rate in zip(groups, state["learning_rates"], strict=True):
        group["lr"] = rate
    if state["scaler"] and getattr(trainer.accelerator, "scaler", None) is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])


def write_progress(trainer: Any, state: Mapping[str, Any]) -> None:
    """Set what the Trainer's loop sets to zero when it begins."""
    trainer._total_loss_scalar = state["loss_total"]
    # train_loss is then the mean over all steps, as of a run that was not interrupted
    trainer._initial_global_step = 0
    trainer._globalstep_last_logged = state["logged_step"]
    metrics = _trl_metrics(trainer)
    for name, values in state["metrics"].items():
        metrics[name].extend(values)
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = state["metric_tokens"]


def read_ranks(trainer: Any) -> dict[str, Tensor]:
    """`rank/N/…` → tensor, of all ranks on all ranks; collective."""
    own = {
        **{f"rng/{name}": value for name, value in rng_state(_devices(trainer)).items()},
        **{f"window/{n}": value for n, value in trainer.observation.state_dict().items()},
        "loss": trainer._tr_loss.detach(),
    }
    own = {name: value.to("cpu", copy=True) for name, value in own.items()}
    return {
        f"rank/{rank}/{name}": value
        for rank, found in enumerate(gather_object([own]))
        for name, value in found.items()
    }


def write_rng(trainer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Go on with this rank's random numbers; a rank that there was not gets a seed of its own."""
    rank = trainer.args.process_index
    own = _under(tensors, f"rank/{rank}/rng/")
    if own:
        set_rng_state(own, _devices(trainer))
        return
    step = trainer.state.global_step
    torch.manual_seed(trainer.args.seed + 1_000_003 * rank + step)


def write_sums(trainer: Any, tensors: Mapping[str, Tensor], *, world_size: int) -> None:
    """Go on with the sums of the open window of metrics.

    On another number of processes than `world_size` the first takes over all of them.
    """
    rank, now, device = trainer.args.process_index, trainer.args.world_size, trainer.args.device
    ranks = [_under(tensors, f"rank/{r}/") for r in range(world_size)]
    if now == world_size:
        losses = [ranks[rank]["loss"]]
    else:
        losses = [found["loss"] for found in ranks] if rank == 0 else []
    # the loss of a line is a mean over the processes
    total = torch.stack(losses).sum() * (now / world_size) if losses else torch.zeros(())
    trainer._tr_loss = total.to(device, trainer._tr_loss.dtype)
    windows = [_under(found, "window/") for found in ranks]
    trainer.observation.load_state_dict(windows, rank=rank, world_size=now, device=device)


def _groups(trainer: Any) -> list[dict[str, Any]]:
    return [
        {"learning rate": rate, "weight decay": group["weight_decay"]}
        for rate, group in zip(
            trainer.lr_scheduler.base_lrs, trainer.optimizer.param_groups, strict=True
        )
    ]


def _devices(trainer: Any) -> list[torch.device]:
    device = trainer.args.device
    return [device] if device.type == "cuda" else []


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) :]: value for n, value in tensors.items() if n.startswith(prefix)}


def _trl_metrics(trainer: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = getattr(trainer, "_metrics", {}).get("train", {})
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _data(rows: Any) -> str:
    """Number of rows and a hash of up to 64 of them, evenly spread."""
    try:
        count = len(rows)
    except TypeError:
        return "unknown"
    places = sorted({i * (count - 1) // 63 for i in range(64)})
    found = hashlib.sha256()
    for place in places:
        found.update(json.dumps(rows[place], sort_keys=True, default=str).encode())
    return f"{count} rows, {found.hexdigest()[:16]}"

"""A tiny run that is interrupted and goes on: dropout, a schedule, clipping, two learning rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from tiny_models import sequences, tiny
from tiny_runs import tokenizer
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig

import molora
from molora.data import Collator
from molora.train import SFTTrainer, checkpoints
from molora.train.gather import gathered_state
from molora.train.optimizer_state import read_state

STEPS = 12
# 40 examples of unlike lengths: five steps of two times four rows an epoch
ROWS = [row.tolist() for row in sequences([4 + (3 * i) % 7 for i in range(40)])]


class At(TrainerCallback):
    """Does something after an optimiser step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


class Killed(Exception):
    """Stands for the end of the process."""


def kill() -> None:
    raise Killed


def trainer_in(out: Path, *, callbacks: Any = (), seed: int = 0, **options: Any) -> SFTTrainer:
    """Two micro-batches of 4 rows a step, dropout, a schedule, clipping; logs by three,
    saves by `save_steps`, so that a checkpoint falls inside an open window of metrics."""
    mixture_options = {"num_experts": 3, "top_k": 2, "rank": 3, "dropout": 0.2}
    mixture_options |= options.pop("mixture", {})
    mixture = molora.attach(tiny("llama"), molora.presets.mola(**mixture_options), seed=seed)
    keywords = {"router_learning_rate": 3e-2, **options.pop("keywords", {})}
    rows = options.pop("rows", ROWS)
    defaults = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 3,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTTrainer(
        mixture.model,
        SFTConfig(**{**defaults, **options}),
        mixture=mixture,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=tokenizer(),
        data_collator=Collator(pad_token_id=2),
        callbacks=list(callbacks),
        **keywords,
    )


def everything(trainer: SFTTrainer) -> dict[str, Tensor]:
    """Weights and optimiser state of a trainer that has finished."""
    state = gathered_state(trainer.mixture, rank0_only=False)
    moments = read_state(trainer.optimizer, checkpoints.trained(trainer))
    assert any(name.endswith("/exp_avg_sq") for name in moments)
    return state | moments


def logged(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """Lines of training and the summary, without what clocks and memory say."""
    timed = ("_per_second", "runtime", "memory_mib")
    return [
        {name: value for name, value in line.items() if not name.endswith(timed)}
        for line in trainer.state.log_history
        if "loss" in line or "train_loss" in line
    ]

"""Trainers of tiny mixtures, on ragged rows of random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from tiny_models import randomize, sequences, tiny
from tiny_runs import tokenizer
from torch import nn

import molora
from molora.config import Group, LoadBalance, Loss, RouterZ
from molora.data import Collator
from molora.train import SFTTrainer

LOSSES = (Loss(term=LoadBalance(), coefficient=0.5), Loss(term=RouterZ(), coefficient=0.1))
ROUTED = {"num_experts": 4, "rank": 3}
LENGTHS = (9, 4, 6, 3, 8, 5, 7, 4)


def mixture_on(model: nn.Module | None = None, **settings: Any) -> molora.Mixture:
    """Experts and routers that do something, on every linear; `group` and others are settings."""
    group = Group(**{**ROUTED, **settings.pop("group", {})})
    config = molora.MixtureConfig(groups=(group,), **{"losses": LOSSES, **settings})
    mixture = molora.attach(model or tiny("llama"), config)
    randomize(mixture)
    return mixture


def dataset(lengths: Sequence[int] = LENGTHS) -> Dataset:
    """Every token has a label."""
    rows = [row.tolist() for row in sequences(lengths)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def arguments(output_dir: Path, **options: Any) -> trl.SFTConfig:
    """Two steps of four rows, with a line of metrics each."""
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return trl.SFTConfig(**{**defaults, **options})


def sft(
    mixture: molora.Mixture,
    output_dir: Path,
    *,
    data: Dataset | None = None,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> SFTTrainer:
    """`keywords` are the trainer's, `options` its arguments'."""
    return SFTTrainer(
        mixture.model,
        arguments(output_dir, **options),
        mixture=mixture,
        train_dataset=data if data is not None else dataset(),
        processing_class=tokenizer(),
        **{"data_collator": Collator(pad_token_id=2), **(keywords or {})},
    )

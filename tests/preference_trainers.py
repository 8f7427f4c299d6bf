"""Mixtures with a DPO trainer, and eight ragged pairs for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from tiny_models import randomize, sequences, tiny
from tiny_runs import tokenizer
from torch import Tensor, nn

import molora
from molora.config import Capacity, FFNSite, Group, LinearSite, LoadBalance, Loss, TopK
from molora.train import DPOTrainer

BALANCE = (Loss(term=LoadBalance(), coefficient=0.5),)
LINEAR = {"select": TopK(k=2)}
FFN = {"site": FFNSite(), "targets": "ffn", "select": TopK(k=2)}
CAPACITY = {
    "site": LinearSite(scope="block"),
    "select": Capacity(k=2, tokens=3, renormalize=True),
}


def mixture_on(
    model: nn.Module | None = None, *, losses: Sequence[Loss] = BALANCE, **group: Any
) -> molora.Mixture:
    group = {"num_experts": 4, "rank": 3, **LINEAR, **group}
    config = molora.MixtureConfig(groups=(Group(**group),), losses=tuple(losses))
    mixture = molora.attach(model or tiny("llama"), config)
    randomize(mixture)
    return mixture


def pairs(**columns: Any) -> Dataset:
    """Eight ragged prompts, each with two answers of other lengths."""
    columns |= {
        "prompt_ids": sequences((5, 3, 6, 2, 4, 3, 5, 2), seed=1),
        "chosen_ids": sequences((4, 7, 2, 5, 3, 6, 1, 4), seed=2),
        "rejected_ids": sequences((6, 3, 5, 1, 7, 2, 4, 3), seed=3),
    }
    return Dataset.from_dict(
        {n: [v.tolist() if isinstance(v, Tensor) else v for v in vs] for n, vs in columns.items()}
    )


def trainer_on(
    mixture: molora.Mixture, folder: Path, *, data: Dataset | None = None, **options: Any
) -> DPOTrainer:
    names = ("aux_losses", "optimizers", "eval_dataset", "ref_model", "data_collator")
    keywords = {name: options.pop(name) for name in names if name in options}
    defaults = {
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "max_length": None,
    }
    return DPOTrainer(
        mixture.model,
        trl.DPOConfig(**{**defaults, **options}),
        mixture=mixture,
        train_dataset=pairs() if data is None else data,
        processing_class=tokenizer(),
        **keywords,
    )


def logged(trainer: DPOTrainer) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]

"""A run whose numbers do not depend on how many processes share its eight rows a step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiny_trainers import dataset, mixture_on, sft

from molora.train import SFTTrainer
from molora.train.summary import Report

LENGTHS = [3 + (5 * i) % 9 for i in range(24)]


def trainer_in(output_dir: Path, *, rows_per_process: int, **options: Any) -> SFTTrainer:
    """Three steps in one window of metrics, without auxiliary losses: a loss of a rank's own rows
    is not that of all rows."""
    return sft(
        mixture_on(losses=()),
        output_dir,
        data=dataset(LENGTHS),
        per_device_train_batch_size=rows_per_process,
        max_steps=3,
        logging_steps=3,
        max_grad_norm=0.5,
        **options,
    )


def reports_of(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """Train, and return what was reported, as JSON."""
    found: list[Report] = []
    trainer.observation.listeners.append(found.append)
    trainer.train()
    return [asdict(report) for report in found]

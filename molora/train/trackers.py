"""What of a report goes to TensorBoard and Weights & Biases: numbers of every site.

Both get the Trainer's own logs through transformers. Numbers of sites go around these logs, which
are kept in memory and in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from transformers.integrations import TensorBoardCallback, WandbCallback

from molora.errors import ConfigError
from molora.train.summary import Report


def check_installed(names: Iterable[str]) -> None:
    """Raise ConfigError for a tracker whose package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"train.report_to names {name}, which is not installed. "
                "Run pip install 'molora[track]', or take it out: metrics.jsonl has it all."
            )


def send(report: Report, callbacks: Sequence[Any]) -> None:
    """Write ``routing/SITE/NAME`` to those trackers of a Trainer that are running."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for name, value in scalars(report).items():
                callback.tb_writer.add_scalar(name, value, report.step)
            for alarm in report.alarms:
                callback.tb_writer.add_text("alarms", alarm.message, report.step)
        elif isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                wandb.log({**scalars(report), "train/global_step": report.step})


def scalars(report: Report) -> dict[str, float]:
    """Every number of every site by name; a load has one per expert, ``routing/SITE/load/0``."""
    found: dict[str, float] = {}
    for site, numbers in report.sites.items():
        for name, value in numbers.items():
            if name == "load":
                found |= {f"routing/{site}/load/{e}": load for e, load in enumerate(value)}
            elif name == "dead":
                found[f"routing/{site}/dead_experts"] = len(value)
            else:
                found[f"routing/{site}/{name}"] = value
    return found

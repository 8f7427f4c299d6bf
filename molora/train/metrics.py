"""Metrics as lines of JSON: one per logging step and evaluation, and a summary at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import TrainerCallback

# Timings and counts of the Trainer's own, for which there are better ones here.
_LEFT_OUT = ("num_tokens", "total_flos", "runtime", "per_second")


class MetricsWriter(TrainerCallback):
    """Appends to a file that starts empty; each line is complete when it is written.

    Every line has ``kind`` and ``step``. Kind ``train`` has loss, aux_loss, aux/NAME, load_min,
    load_max, dead_experts, grad_norm, learning_rate, tokens, tokens_per_second and memory_mib;
    kind ``eval`` has eval_loss. `entropy` and `mean_token_accuracy` are TRL's, of the predictions.
    A number that is not finite is written as null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text("", encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kind = kind_of(kwargs["logs"])
        if kind is not None and state.is_world_process_zero:
            values = {"epoch": state.epoch, **measured(kwargs["logs"])}
            if kind == "train":
                values["memory_mib"] = memory_mib()
            self.write(kind, state.global_step, values)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        seconds = round(time.perf_counter() - self._started, 3)
        line = {"kind": kind, "step": step, "seconds": seconds, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")


def kind_of(logs: Mapping[str, Any]) -> str | None:
    """`train`, `eval`, or None for a Trainer's closing words."""
    if "loss" in logs:
        return "train"
    return "eval" if any(name.startswith("eval_") for name in logs) else None


def measured(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a Trainer's logs that is kept."""
    return {
        name: value
        for name, value in logs.items()
        if name == "tokens_per_second" or not name.endswith(_LEFT_OUT)
    }


def memory_mib() -> float:
    """Most GPU memory allocated so far, or without a GPU the memory that the process holds now."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(psutil.Process().memory_info().rss / 2**20, 1)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

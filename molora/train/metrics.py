"""Metrics as lines of JSON: one per logging step and evaluation, and a summary at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from molora.io import atomic
from molora.train.summary import Report
from molora.train.throughput import Remaining

# Timings and counts of the Trainer's own, for which there are better ones here.
_LEFT_OUT = ("num_tokens", "total_flos", "runtime", "per_second")


class MetricsWriter(TrainerCallback):
    """Appends to a file; each line is complete when it is written.

    Every line has ``kind``, ``step`` and ``seconds`` (since the run began). Numbers are of all
    ranks together.

    * Kind ``train``, a mean over the steps since the line before or of the last step alone:

      - ``loss``, ``learning_rate`` (of the first group of parameters; of each as
        ``learning_rate/NAME`` where they differ); ``aux_loss``, the weighted auxiliary losses, a
        part of ``loss``; ``aux/NAME``, each term before its coefficient;
      - ``load_min``, ``load_max``, ``dead_experts``: least and greatest load of any expert of any
        site (its share of the choices, times E), and the number of experts without any;
      - ``routing_entropy`` and ``routing_margin``, means over the sites, and ``rank_agreement``,
        the least of any site: see `site_numbers`;
      - ``grad_norm``, ``expert_grad_norm``, ``router_grad_norm``, ``other_grad_norm``: of the last
        step before clipping; the squares of the three add up to that of the first;
      - ``tokens`` (not padding, since the start), ``tokens_per_second``, ``mfu`` (see
        `TokenFlops`; where the GPU's peak is known), ``memory_mib`` (most of any rank),
        ``eta_seconds``;
      - ``entropy`` and ``mean_token_accuracy``: TRL's, of the predictions; in preference training
        also its ``rewards/…``, ``logps/…`` and ``logits/…``, of the chosen and rejected answers.

    * Kind ``routing``: ``sites``, site → `site_numbers`, in five digits.
    * Kind ``alarm``: ``site``, ``event`` (dead, collapsed, recovered), ``experts``, ``steps``,
      ``message``; see `RoutingAlarms`.
    * Kind ``eval``: ``eval_loss``, a mean over the supervised tokens of all rows, and TRL's numbers
      with the same prefix.

    A number that is not finite is written as null. A new run starts the file anew; a resumed one
    goes on after the lines up to its checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = time.perf_counter()
        self._remaining = Remaining()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remaining.start(state.global_step)
        if not state.is_world_process_zero:
            return
        kept = _until(state.global_step, self.path) if state.global_step else []
        if kept:
            self._started = time.perf_counter() - max(line["seconds"] for line in kept)
        text = "".join(_text(line) for line in kept)
        atomic.put(
            self.path.parent,
            lambda file: file.write_text(text, encoding="utf-8"),
            lambda _: self.path.name,
        )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kind = kind_of(kwargs["logs"])
        if kind is not None and state.is_world_process_zero:
            values = {"epoch": state.epoch, **measured(kwargs["logs"])}
            if kind == "train":
                left = self._remaining.seconds(state.global_step, state.max_steps)
                values["eta_seconds"] = round(left, 1)
            self.write(kind, state.global_step, values)

    def on_report(self, report: Report) -> None:
        """Write what a report says of every site, and its alarms."""
        if report.sites:
            self.write("routing", report.step, {"sites": _shortened(report.sites)})
        for alarm in report.alarms:
            self.write("alarm", alarm.step, asdict(alarm))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        seconds = round(time.perf_counter() - self._started, 3)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_text({"kind": kind, "step": step, "seconds": seconds, **values}))


def kind_of(logs: Mapping[str, Any]) -> str | None:
    """`train`, `eval`, or None for a Trainer's closing words."""
    if "loss" in logs:
        return "train"
    return "eval" if any(name.startswith("eval_") for name in logs) else None


def group_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """``learning_rate/NAME`` of every group of parameters, unless all learn at the same rate."""
    groups = [group for group in optimizer.param_groups if "name" in group]
    if len({group.get("initial_lr", group["lr"]) for group in groups}) < 2:
        return {}
    return {f"learning_rate/{group['name']}": float(group["lr"]) for group in groups}


def measured(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a Trainer's logs that is kept."""
    return {
        name: value
        for name, value in logs.items()
        if name == "tokens_per_second" or not name.endswith(_LEFT_OUT)
    }


def _until(step: int, path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file up to a step, without the summary of a run that was longer."""
    if not path.is_file():
        return []
    lines = _parsed(path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [line for line in lines if line["step"] <= step and line["kind"] != "summary"]


def _parsed(texts: Iterable[str]) -> Iterable[dict[str, Any]]:
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the last line of a process that was killed
        if isinstance(line, dict) and {"kind", "step", "seconds"} <= line.keys():
            yield line


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(_finite(line), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shortened(value: Any) -> Any:
    """Floats in five digits: a large model has thousands of them on every line."""
    if isinstance(value, Mapping):
        return {name: _shortened(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value

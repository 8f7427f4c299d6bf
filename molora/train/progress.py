"""How far a run is, on the terminal: a bar where there is one, else a line per logging step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from molora.config.run import RunConfig
from molora.data import Tokenized
from molora.train.dry_run import DryRun, render
from molora.train.metrics import kind_of
from molora.train.throughput import Remaining, duration

if TYPE_CHECKING:
    from molora.train.run import TrainResult


class ProgressDisplay(TrainerCallback):
    """Steps, time left, tokens/s, memory, loss, auxiliary loss and the range of expert loads.

    As a context manager it gives the terminal back, also after an error.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._task: Any = None
        self._remaining = Remaining()

    def show_run(
        self, data: Tokenized, mixture: DryRun, *, engine: Mapping[str, Any] | None = None
    ) -> None:
        """Say what is trained, on what, and with which configuration of DeepSpeed."""
        render(mixture, self.console)
        counts = data.train_counts
        self.console.print(
            f"{counts.examples:,} examples of {counts.rows:,} rows: {counts.tokens:,} tokens, "
            f"{counts.supervised:,} of them with a loss; max_length cut {counts.truncated:,} and "
            f"left out {counts.dropped:,}",
            highlight=False,
            soft_wrap=True,
        )
        if (rates := data.packing) is not None:
            self.console.print(
                f"packed into {rates.bins:,} rows, {rates.sequences_per_bin:.1f} sequences to a "
                f"row, {rates.fill:.1f} % full",
                highlight=False,
                soft_wrap=True,
            )
        if engine is not None:
            shown = f"DeepSpeed: {json.dumps(engine)}"
            self.console.print(shown, highlight=False, markup=False, soft_wrap=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remaining.start(state.global_step)
        wanted = self.console.is_terminal and not self.console.quiet
        if not (wanted and state.is_world_process_zero):
            return
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=self.console,
        )
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        kind = kind_of(logs)
        if kind is None or not state.is_world_process_zero:
            return
        if kind == "eval":
            shown = f"step {state.global_step}: evaluation loss {logs.get('eval_loss', 0):.4f}"
            self.console.print(shown, highlight=False)
        elif self._bar is not None:
            self._bar.update(self._task, description=figures(logs))
        else:
            done, total = state.global_step, state.max_steps
            left = duration(self._remaining.seconds(done, total))
            self.console.print(
                f"step {done}/{total} · {left} left · {figures(logs)}",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def figures(logs: Mapping[str, Any]) -> str:
    """One line of text from the logs of a training step."""
    parts = [f"loss {logs['loss']:.4f}"]
    if "aux_loss" in logs:
        parts.append(f"aux {logs['aux_loss']:.4f}")
    if "load_min" in logs:
        parts.append(f"load {logs['load_min']:.2f}–{logs['load_max']:.2f}")
        if logs["dead_experts"]:
            parts.append(f"{logs['dead_experts']} dead experts")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:.0f} tokens/s")
    if "mfu" in logs:
        parts.append(f"{logs['mfu']:.0%} of peak")
    if "memory_mib" in logs:
        parts.append(f"{logs['memory_mib']:.0f} MiB")
    return " · ".join(parts)


def closing_words(config: RunConfig, result: TrainResult) -> str:
    """What came out of a run, and how to try it."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    adapter = result.output_dir / "adapter"
    # a base model from the hub has to be named again: generate fetches nothing unasked
    base = "" if Path(config.model.name).is_dir() else f" --model {config.model.name}"
    return (
        f"{metrics}; {result.tokens:,} tokens in {result.seconds:.0f} s\n"
        f"The mixture is in {adapter}. Try it:\n"
        f'  molora generate --adapter {adapter}{base} --prompt "…"'
    )

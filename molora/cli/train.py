"""``molora train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from molora.config.run import RunConfig
    from molora.train import TrainResult


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Values that replace the file's, such as train.learning_rate=1e-3.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where the results go, instead of the file's output_dir.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained, and train nothing.")
    ] = False,
) -> None:
    """Train a mixture as a YAML file says.

    The mixture, the metrics and the resolved configuration are written to the output directory.

    \b
    Example:
      molora train configs/mola.yaml --dry-run
      molora train configs/mola.yaml --output-dir runs/mola train.max_steps=100 mixture.rank=16
    """
    from molora.presets.overrides import load_run

    run = load_run(config, overrides or [], output_dir=output_dir)
    if dry_run:
        _show_plan(run)
        return
    from molora.train import train as train_run

    typer.echo(_report(run, train_run(run, progress=True)))


def _show_plan(run: RunConfig) -> None:
    from rich.console import Console

    from molora.train.dry_run import dry_run, render

    render(dry_run(run), Console())


def _report(run: RunConfig, result: TrainResult) -> str:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    adapter = result.output_dir / "adapter"
    # a base model from the hub has to be named again: generate fetches nothing unasked
    base = "" if Path(run.model.name).is_dir() else f" --model {run.model.name}"
    return (
        f"{metrics}; {result.tokens:,} tokens in {result.seconds:.0f} s\n"
        f"The mixture is in {adapter}. Try it:\n"
        f'  molora generate --adapter {adapter}{base} --prompt "…"'
    )

"""``molora train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from molora.config.run import RunConfig


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
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to start on this machine, one per GPU."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|DIR",
            help="Go on from a checkpoint. auto: the newest complete one of the output "
            "directory, or from the beginning if there is none.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a mixture as a YAML file says.

    The mixture, the metrics and the resolved configuration are written to the output directory.
    Several processes are started by --nproc, or by deepspeed, torchrun or srun: see
    examples/launch.

    \b
    Example:
      molora train configs/mola.yaml --dry-run
      molora train configs/mola.yaml --output-dir runs/mola train.max_steps=100 mixture.rank=16
      molora train configs/mola.yaml --nproc 8 --resume auto train.deepspeed=zero2
    """
    from molora.presets.overrides import load_run

    if dry_run:
        _show_plan(load_run(config, overrides or [], output_dir=output_dir))
        return
    if nproc is not None and nproc > 1:
        from molora.train.launch import launch

        run = load_run(config, overrides or [], output_dir=output_dir)
        arguments = [str(config), *(overrides or [])]
        if output_dir is not None:
            arguments.append(f"--output-dir={output_dir}")
        if resume is not None:
            arguments.append(f"--resume={resume}")
        code = launch(run, [*arguments, *(["--quiet"] if quiet else [])], processes=nproc)
    else:
        from molora.train.__main__ import train_here

        code = train_here(
            config, overrides or [], output_dir=output_dir, resume=resume, quiet=quiet
        )
    if code:
        raise typer.Exit(code)


def _show_plan(run: RunConfig) -> None:
    from rich.console import Console

    from molora.train.dry_run import dry_run, render

    render(dry_run(run), Console())

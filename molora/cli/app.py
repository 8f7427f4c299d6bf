"""The table of commands, and what every command does about errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from molora import __version__
from molora.cli.bench import bench
from molora.cli.compose import compose
from molora.cli.data import data
from molora.cli.doctor import declared, doctor
from molora.cli.export import export
from molora.cli.generate import chat, generate
from molora.cli.inspect import inspect
from molora.cli.listing import methods, schema
from molora.cli.train import train
from molora.errors import MoLoRAError

USER_ERROR, INTERRUPTED = 2, 130


class Commands(TyperGroup):
    """Tells a user's error in one message without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MoLoRAError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except ModuleNotFoundError as error:
            extra = _extra_of(error.name or "")
            if extra is None:
                raise
            typer.echo(
                f"Error: this command needs the package {error.name}, which is not installed. "
                f"Run: pip install 'molora[{extra}]'",
                err=True,
            )
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            typer.echo("Stopped.", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _extra_of(module: str) -> str | None:
    """The extra that holds a missing package; None for one that molora does not declare."""
    name = module.partition(".")[0]
    return next((extra for package, _, extra in declared() if package == name), None)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    # plain text: a user's message holds brackets, which markup would swallow
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (train, compose, generate, chat, inspect, export, methods, schema, doctor, bench):
    app.command()(command)
app.add_typer(data, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"molora {__version__}")
        raise typer.Exit


@app.callback()
def molora(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Mixtures of LoRA experts on Hugging Face models."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if none is given, and return its exit code.

    0 is success, 1 means that `doctor` found something, 2 is an error of the user's, told in one
    message on stderr, and 130 an interrupt from the keyboard.
    """
    try:
        get_command(app)(args=arguments, prog_name="molora")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0

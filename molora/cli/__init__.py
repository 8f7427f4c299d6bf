"""The command `molora`: thin, and quick to start, for heavy imports wait inside the commands."""

from molora.cli.app import main

__all__ = ["main"]

"""The command line, called in the process, and a model with a mixture for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def molora(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Arguments → outcome; anything but an exit code that comes out of the command is an error."""

    def run(*arguments: object) -> Outcome:
        from molora.cli import main

        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model in a directory."""
    from chat_models import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def adapter(base: Path) -> Path:
    """A randomised mixture for it."""
    from chat_models import save_adapter

    return save_adapter(base.parent / "adapter", base)

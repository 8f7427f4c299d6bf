"""What holds for every command: help, versions, errors, interrupts, and a quick start."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architecture_rules import imports_of, read_sources

import molora as package
from molora.errors import AttachError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    *("train", "compose", "generate", "chat", "inspect", "export", "methods", "schema", "doctor"),
    *("bench", "data"),
]


def test_version(molora: Callable[..., Any]) -> None:
    outcome = molora("--version")
    assert (outcome.code, outcome.out) == (0, f"molora {package.__version__}\n")


def test_help_names_every_command(molora: Callable[..., Any]) -> None:
    outcome = molora("--help")
    assert outcome.code == 0
    listed = [line.split()[0] for line in outcome.out.partition("Commands:")[2].splitlines()[1:]]
    assert listed == COMMANDS
    assert "..." not in outcome.out.partition("Commands:")[2]  # no summary is cut off


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example_that_names_it(
    molora: Callable[..., Any], command: str
) -> None:
    outcome = molora(command, "--help")
    assert outcome.code == 0
    _, _, example = outcome.out.partition("Example:\n")
    assert example.lstrip().startswith(f"molora {command}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["generate", "--adapter", "a", "--promt", "b"], "No such option: --promt"),
        (["generate", "--adapter", "a"], "Missing option '--prompt'"),
        (
            ["generate", "--adapter", "a", "--prompt", "b", "--seed", "x"],
            "Invalid value for '--seed'",
        ),
        (["train"], "Missing argument"),
        (["inspect"], "Missing argument"),
    ],
)
def test_a_bad_command_line_is_exit_code_2_and_one_message(
    molora: Callable[..., Any], arguments: list[str], message: str
) -> None:
    outcome = molora(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert message in outcome.err
    assert outcome.err.count("Error") == 1


def raising(error: BaseException) -> Callable[..., None]:
    def command(*args: object, **kwargs: object) -> None:
        raise error

    return command


def test_an_error_of_molora_is_exit_code_2_and_its_message_alone(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora.presets.methods", raising(AttachError("rule, [value], remedy")))
    outcome = molora("methods")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", "Error: rule, [value], remedy\n")


def test_an_interrupt_is_exit_code_130(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora.presets.methods", raising(KeyboardInterrupt()))
    outcome = molora("methods")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "Stopped.\n")


def test_a_fault_of_moloras_own_keeps_its_traceback(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora.presets.methods", raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        molora("methods")


def test_the_command_line_imports_nothing_heavy_before_a_command_runs() -> None:
    allowed = {"typer", "molora", "rich", *sys.stdlib_module_names}
    sources = [source for source in read_sources(ROOT) if source.package == "cli"]
    at_import = [found for source in sources for found in imports_of(source) if found.at_import]
    assert len(sources) > 5
    assert {found.module.split(".")[0] for found in at_import} <= allowed
    ours = {found.module for found in at_import if found.module.startswith("molora.")}
    assert {name for name in ours if not name.startswith("molora.cli")} == {"molora.errors"}
    # the control: a command does import heavy things
    tree = ast.parse((ROOT / "molora/cli/generate.py").read_text(encoding="utf-8"))
    assert "molora.generate" in {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }


def test_python_dash_m_molora_is_the_command_line_and_starts_without_trainers() -> None:
    code = (
        "import json, runpy, sys\n"
        "sys.argv = ['molora', 'methods']\n"
        "try: runpy.run_module('molora', run_name='__main__')\n"
        "except SystemExit as stop: code = stop.code\n"
        "print(json.dumps([code, sorted(sys.modules)]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    *table, last = out.stdout.splitlines()
    exit_code, modules = json.loads(last)
    assert exit_code == 0
    assert table[1].split()[0] == "lora"
    assert not {"trl", "deepspeed", "datasets", "accelerate", "matplotlib"} & set(modules)
    assert not {"molora.train", "molora.generate", "molora.data"} & set(modules)

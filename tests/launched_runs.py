"""Helps tests that start `molora train` as a user does: processes with an environment for ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_runs
from launches import clear_left_locks, environment, free_port

# without balance losses: these are of a process's batch, and two batches are not one of both
MIXTURE = {"preset": "mola", "num_experts": [2, 3], "rank": 2, "dropout": 0.0, "losses": []}
ROWS = [dict(row) for row in tiny_runs.ROWS * 4]


def write_run(folder: Path, base: Path, **sections: Any) -> Path:
    """A run of four steps, two rows a process and step."""
    folder.mkdir(exist_ok=True)
    rows = tiny_runs.write_rows(folder / "rows.jsonl", ROWS)
    train = {"max_steps": 4, "batch_size": 2, "logging_steps": 1, **sections.pop("train", {})}
    return tiny_runs.write_run(folder / "run.yaml", base, rows, MIXTURE, train=train, **sections)


def start(*command: object, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start a program; its output is read by `end`."""
    clear_left_locks()
    clear_left_locks()
    return subprocess.Popen(
        [*map(str, command)],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], *, timeout: float = 240) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; what has not ended in time is killed, which is an error."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def ranks(
    *arguments: object, size: int = 2, port: int | None = None, only: Sequence[int] | None = None
) -> list[list[str]]:
    """Per rank, `env` and a command line: `python -m molora.train` without any launcher."""
    port = port or free_port()
    return [
        [
            *("env", f"RANK={rank}", f"WORLD_SIZE={size}", f"LOCAL_RANK={rank}"),
            *("MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}"),
            *(sys.executable, "-m", "molora.train", *map(str, arguments)),
        ]
        for rank in (range(size) if only is None else only)
    ]

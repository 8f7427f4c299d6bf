"""Locks of compilations. torch holds one while it compiles an extension; a killed run leaves its
lock, and every later run then waits for it for ever, without a word."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from molora.errors import TrainingError

POLL_SECONDS = 0.5


def compile_locks() -> list[Path]:
    """Every lock in the place where torch.utils.cpp_extension compiles."""
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return sorted(Path(chosen).glob("*/lock"))
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache else Path.home() / ".cache"
    return sorted(root.glob("torch_extensions/*/*/lock"))


def check_locks(extensions: Sequence[str], *, patience: float = 20.0) -> None:
    """Return once nothing stands in the way of loading these extensions.

    A lock is left over if nothing in its directory changes and no process of this machine works
    in it for `patience` seconds; while something does, this waits.

    Raises:
        TrainingError: naming a lock that is left over.
    """
    started = time.monotonic()
    while locks := [lock for lock in compile_locks() if lock.parent.name in extensions]:
        for lock in locks:
            if is_compiling(lock):
                started = time.monotonic()
            elif _age(lock.parent) > patience or time.monotonic() - started > patience:
                raise TrainingError(
                    f"{lock} makes DeepSpeed wait for a compilation that nobody does: a killed run "
                    "left it. Delete it and start again. If another machine is compiling into "
                    "this directory right now, wait until it has finished."
                )
        time.sleep(POLL_SECONDS)


def is_compiling(lock: Path) -> bool:
    """Whether a process of this machine works in the lock's directory, as ninja does."""
    import psutil  # type: ignore[import-untyped]

    folder = str(lock.parent.resolve())
    return any(process.info["cwd"] == folder for process in psutil.process_iter(["cwd"]))


def _age(folder: Path) -> float:
    """Seconds since anything in a directory was written; 0 if it changes while one looks."""
    try:
        written = max(entry.stat().st_mtime for entry in (folder, *folder.iterdir()))
    except FileNotFoundError:
        return 0.0
    return time.time() - written

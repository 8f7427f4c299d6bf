"""Directories that are complete or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molora.errors import CheckpointError


@contextmanager
def atomic_directory(target: Path, *, ours: frozenset[str]) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends without an
    error.

    Files are flushed to disk before the renames. A directory that is there already is replaced only
    if it holds nothing but the files named in `ours`; it is put back if the replacement fails.

    Raises:
        CheckpointError: `target` is a file, a link or a directory with other files in it.
    """
    check_replaceable(target, ours=ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    )
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        _swap(temporary, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(target: Path, *, ours: frozenset[str]) -> None:
    """Raise CheckpointError unless `target` is absent or holds only files named in `ours`."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is not a directory. Choose another place to save to.")
    others = (
        sorted(path.name for path in target.iterdir() if path.name not in ours)
        if target.exists()
        else []
    )
    if others:
        raise CheckpointError(
            f"{target} holds other files ({', '.join(others[:3])}), which saving would delete. "
            "Choose a new directory."
        )


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(aside / target.name)
    try:
        temporary.rename(target)
    except OSError:
        (aside / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

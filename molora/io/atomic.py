"""Files that are there completely or not at all, wherever the process is killed.

Two files cannot be renamed at once. So of the two that make a saved mixture, the large one has a
name made from its content, and the small one, which names it, is replaced last and by one rename:
before it the directory holds the old mixture, after it the new one. What a killed process leaves,
an unfinished file or a large one that nobody names, is deleted by the next save.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

PARTIAL = re.compile(r"\.molora\.[0-9a-f]+\.partial")
"""Names of unfinished files."""
STALE_SECONDS = 3600.0
"""An unfinished file that was not written to for so long belongs to a process that is gone; younger
ones are left alone, since ranks of one job may save the same mixture at once."""


def put(directory: Path, write: Callable[[Path], object], name: Callable[[Path], str]) -> Path:
    """Write a file under a temporary name, flush it to disk, rename it to `name(file)`.

    Raises:
        OSError: from writing; nothing is left behind.
    """
    partial = directory / f".molora.{secrets.token_hex(8)}.partial"
    try:
        write(partial)
        flush(partial)
        final = directory / name(partial)
        os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # the rename itself is on the disk only after this
    flush(directory)
    return final


def is_partial(path: Path) -> bool:
    """Whether it is an unfinished file."""
    return PARTIAL.fullmatch(path.name) is not None


def is_stale(path: Path) -> bool:
    """Whether it is an unfinished file that nobody writes any more."""
    return is_partial(path) and time.time() - path.stat().st_mtime > STALE_SECONDS


def tidy(
    directory: Path, *, manifest: str, tensors: re.Pattern[str], leftover: Callable[[Path], bool]
) -> None:
    """Delete files named from their content (`tensors`, its group 1 is the hash) that the manifest
    does not name, and leftovers. What cannot be deleted now does no harm; a later save does it."""
    with contextlib.suppress(OSError):
        text = (directory / manifest).read_bytes() if (directory / manifest).exists() else b""
        for path in directory.iterdir():
            digits = tensors.fullmatch(path.name)
            if leftover(path) or (digits and digits[1].encode() not in text):
                path.unlink()


def flush(path: Path) -> None:
    """fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

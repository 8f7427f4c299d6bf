"""Files of a saved thing: in its directory themselves, and with the bytes that were promised."""

from __future__ import annotations

import hashlib
from pathlib import Path

from molora.errors import CheckpointError


def contained(directory: Path, name: str, *, what: str, parts: str) -> Path:
    """The file in the directory itself: a link could lead anywhere.

    `what` is saved there, e.g. "a saved mixture", and `parts` names its files, for messages.

    Raises:
        CheckpointError: no such directory or file, or a link.
    """
    path = directory / name
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory with {what}.")
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link. {what.capitalize()} holds its files itself.")
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {name}. {what.capitalize()} has {parts}.")
    return path


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Files of a saved thing: in its directory themselves, and with the bytes that were promised."""

from __future__ import annotations

import hashlib
from pathlib import Path

from molora.errors import CheckpointError


def contained(directory: Path, name: str, *, what: str, parts: str) -> Path:
    """The file in the directory itself, or in the hub's cache the one that its snapshot links to;
    any other link could lead anywhere.

    `what` is saved there, e.g. "a saved mixture", and `parts` names its files, for messages.

    Raises:
        CheckpointError: no such directory or file, or a link that leads elsewhere.
    """
    path = directory / name
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory with {what}.")
    if path.is_symlink():
        blob = _blob(path)
        if blob is None:
            raise CheckpointError(
                f"{path} is a link and could lead anywhere: only links of the hub's cache to its "
                "own blobs are followed. Copy the directory with the files themselves, e.g. with "
                "`cp -rL`, and give the copy."
            )
        return blob
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {name}. {what.capitalize()} has {parts}.")
    return path


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blob(link: Path) -> Path | None:
    """The file that a link `REPOSITORY/snapshots/REVISION/…` has in `REPOSITORY/blobs`, if so."""
    try:
        target, place = link.resolve(strict=True), link.parent.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to nothing, or in a circle
        return None
    for above in place.parents:
        if above.name == "snapshots":
            mine = target.parent == above.parent / "blobs"
            return target if mine and target.is_file() else None
    return None

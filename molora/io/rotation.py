"""The checkpoints of a run: which is the newest complete one, and which are deleted."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from molora.errors import CheckpointError, ConfigError
from molora.io import atomic, checkpoint, native
from molora.io.checkpoint import Checkpoint, read_checkpoint

NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
"""Names of directories with a checkpoint; the number is the step."""


class Rotation(NamedTuple):
    """What `rotate` did."""

    deleted: tuple[Path, ...]
    """Directories that are gone, or are checkpoints no more."""
    failed: dict[Path, str]
    """Directories that could not be deleted, and why."""


def checkpoint_directory(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return output_dir / f"checkpoint-{step}"


def complete_checkpoints(output_dir: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """All complete checkpoints, oldest first, and the directories that are none, with the reason.

    Reads and hashes every file; `newest_complete` is cheaper.

    Raises:
        CheckpointError: a directory that cannot be listed.
    """
    skipped: dict[Path, str] = {}
    return list(_complete(output_dir, skipped))[::-1], skipped


def newest_complete(output_dir: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The complete checkpoint of the highest step, and the newer directories that are none, with
    the reason. Older ones are not looked at.

    Raises:
        CheckpointError: a directory that cannot be listed.
    """
    skipped: dict[Path, str] = {}
    return next(_complete(output_dir, skipped), None), skipped


def rotate(output_dir: Path, *, limit: int | None, keep: Collection[Path] = ()) -> Rotation:
    """Delete the oldest checkpoints beyond `limit`, and what killed saves and deletions left.

    The newest complete checkpoint and those of `keep`, e.g. the best one and the one just written,
    stay and count; if they alone are more than `limit`, they all stay. Of the older ones, whose
    hashes are not read again, those that are damaged do not count and are deleted first. None as
    `limit` deletes leftovers alone. What stays: directories newer than the newest complete one,
    links, directories of other names, and files in a checkpoint that are none of its own.

    Raises:
        ConfigError: a limit below 1.
        CheckpointError: a directory that cannot be listed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"The limit of checkpoints is {limit}. Keep at least 1, or set none.")
    newest, _ = newest_complete(output_dir)
    if newest is None:
        return Rotation((), {})
    kept = {newest.directory.resolve(), *(path.resolve() for path in keep if path.exists())}
    room = None if limit is None else max(limit - len(kept), 0)
    deleted, failed = [], {}
    for path in _surplus(output_dir, before=newest.step, kept=kept, room=room):
        try:
            if delete_checkpoint(path):
                deleted.append(path)
        except OSError as error:
            failed[path] = str(error)
    return Rotation(tuple(deleted), failed)


def delete_checkpoint(directory: Path) -> bool:
    """Delete a checkpoint, or what a killed save or deletion left of one; whether there was any.

    It is invisible before its first file goes. Files that are none of its own stay, and so does all
    of a directory that has such files and no readable manifest: it may be another program's.

    Raises:
        OSError: from deleting.
    """
    if directory.is_symlink() or not directory.is_dir():
        return False
    manifest, renamed = directory / checkpoint.MANIFEST, directory / checkpoint.DELETED
    names = {path.name for path in directory.iterdir()}
    listed = _listed(manifest) | _listed(renamed)
    own = {name for name in names if name in listed or _is_ours(name)}
    if own != names and not listed:
        return False
    if manifest.name in names:
        os.replace(manifest, renamed)
        atomic.flush(directory)
    for name in own - {manifest.name, renamed.name}:
        (directory / name).unlink()
    renamed.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # files of others
        directory.rmdir()
    return True


def _complete(output_dir: Path, skipped: dict[Path, str]) -> Iterator[Checkpoint]:
    """From the newest to the oldest; what is passed over goes to `skipped`."""
    for step, path in _named(output_dir):
        if path.is_symlink():
            skipped[path] = f"{path} is a link; none is followed. Give the directory itself."
            continue
        try:
            found = read_checkpoint(path)
        except CheckpointError as error:
            skipped[path] = str(error)
            continue
        if found.step == step:
            yield found
        else:
            skipped[path] = f"{path} holds step {found.step}. Name it checkpoint-{found.step}."


def _surplus(output_dir: Path, *, before: int, kept: set[Path], room: int | None) -> Iterator[Path]:
    """What may go of the steps before one, the oldest first: beyond `room`, or left unfinished."""
    older = [path for step, path in _named(output_dir) if step < before]
    older = [path for path in older if path.resolve() not in kept and not path.is_symlink()]
    complete = [path for path in older if _looks_complete(path)]
    stay = complete[:room]
    for path in reversed(older):
        is_unfinished = not (path / checkpoint.MANIFEST).exists()
        if path not in stay and (room is not None or is_unfinished):
            yield path


def _named(output_dir: Path) -> list[tuple[int, Path]]:
    """Step and path of everything that is called like a checkpoint, the newest first."""
    try:
        paths = list(output_dir.iterdir()) if output_dir.exists() else []
    except OSError as error:
        raise CheckpointError(f"{output_dir} cannot be listed: {error}.") from None
    named = [(NAME.fullmatch(path.name), path) for path in paths]
    return sorted(((int(found[1]), path) for found, path in named if found), reverse=True)


def _looks_complete(directory: Path) -> bool:
    """As far as the manifest and sizes tell."""
    try:
        checkpoint.check_sizes(directory, checkpoint.read_manifest(directory))
    except (CheckpointError, OSError):
        return False
    return True


def _listed(manifest: Path) -> frozenset[str]:
    """Files that a manifest names, whatever it is called; none if it is missing or damaged."""
    try:
        return frozenset(checkpoint.parse_manifest(manifest).files)
    except CheckpointError:
        return frozenset()


def _is_ours(name: str) -> bool:
    return (
        name in {native.MANIFEST, checkpoint.STATE, checkpoint.RUN_STATE}
        or name in {checkpoint.MANIFEST, checkpoint.DELETED}
        or native.TENSORS.fullmatch(name) is not None
        or checkpoint.TENSORS.fullmatch(name) is not None
        or atomic.PARTIAL.fullmatch(name) is not None
    )

"""A training checkpoint: a saved mixture, tensors and JSON of its trainer; complete or invisible.

    checkpoint-N/
        molora.json, molora-….safetensors    the mixture, written by `molora.io.write`
        trainer-….safetensors                any named tensors; the name is made from the content
        trainer_state.json                   any JSON
        checkpoint.json                      written last: size and SHA-256 of every other file

The directory counts only while `checkpoint.json` is there and every file has the size and the hash
that it gives. So a save that was killed leaves nothing that could be taken for a checkpoint, and an
older one, in another directory, is never touched. No path is stored: a directory may be moved.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator
from safetensors import SafetensorError
from torch import Tensor

from molora.config.base import Frozen
from molora.errors import CheckpointError
from molora.io import atomic, sealed
from molora.io.files import contained, sha256
from molora.io.header import TensorInfo, read_header
from molora.io.tensors import info_of, map_tensors, widest_first, write_tensors
from molora.version import VERSION

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
STATE = "trainer_state.json"
RUN_STATE = "run_state.json"
"""What else a caller may write about its run, as one of `files`."""
DELETED = ".checkpoint.deleted.json"
"""What the manifest is called once its checkpoint is being deleted: it still lists the files."""
TENSORS = re.compile(r"trainer-([0-9a-f]{16})\.safetensors")
"""Names of files with the trainer's tensors; the manifest says which one counts."""

FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$"
"""A plain name: a path could lead out of the directory."""
FileName = Annotated[str, Field(pattern=FILE_NAME)]


class StoredFile(Frozen):
    """What a file must be to count."""

    bytes: NonNegativeInt
    """Its size."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of its content."""


class CheckpointManifest(Frozen):
    """`checkpoint.json` without its checksum."""

    format_version: int = Field(ge=1, le=FORMAT_VERSION)
    """Version of this format."""
    molora_version: str
    """Version that wrote the file."""
    step: NonNegativeInt
    """Optimiser steps done."""
    world_size: PositiveInt
    """Processes that trained."""
    stage: int | None = Field(ge=0, le=3)
    """DeepSpeed's ZeRO stage; null without DeepSpeed."""
    files: dict[FileName, StoredFile]
    """Every other file that counts."""

    @field_validator("files")
    @classmethod
    def _have_one_of_each(cls, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
        digits = [found[1] for found in map(TENSORS.fullmatch, files) if found]
        if len(digits) != 1 or files[_tensors_file(digits[0])].sha256[:16] != digits[0]:
            raise ValueError("one file trainer-HASH.safetensors must be listed, with that hash")
        if STATE not in files or MANIFEST in files:
            raise ValueError(f"{STATE} must be listed, and {MANIFEST} itself must not")
        return files

    @property
    def tensors_file(self) -> str:
        """Name of the file with the trainer's tensors."""
        return next(name for name in self.files if TENSORS.fullmatch(name))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as `read_checkpoint` found it."""

    directory: Path
    """Where it lies; `molora.load` reads the mixture from there."""
    step: int
    """Optimiser steps done."""
    world_size: int
    """Processes that trained."""
    stage: int | None
    """DeepSpeed's ZeRO stage; None without DeepSpeed."""
    state: dict[str, Any]
    """Content of `trainer_state.json`."""
    tensors_file: Path
    """The file with the trainer's tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """The trainer's tensors on the CPU, mapped from the file: pages are read when used.

        Unlike a mixture's, they may hold NaN or infinity: this is a record of what was.

        Raises:
            CheckpointError: a file that was changed since, so that its header does not describe it.
        """
        try:
            return map_tensors(self.tensors_file, read_header(self.tensors_file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.tensors_file} cannot be read: {error}.") from None


def write_checkpoint(
    directory: Path,
    *,
    step: int,
    world_size: int,
    stage: int | None,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    files: Sequence[str],
) -> None:
    """Write the trainer's part and then the manifest, which makes `directory` a checkpoint.

    One process writes, after every file of `files` was written there. `tensors` may be on any
    device, one at a time is copied to the CPU; NaN and infinity are kept. What `state` means must
    survive JSON: tuples come back as lists, and keys as text. What a killed save left in the
    directory is replaced or deleted. Written over a complete checkpoint, the directory does not
    count between the first file that differs and the manifest: rather leave such a one alone.

    Raises:
        CheckpointError: a file of `files` that is missing or not called like a plain file, tensors
            or state that cannot be stored, a disk that fails. The directory is then no checkpoint,
            unless it was one and the disk failed before anything in it differed.
        ConfigError: a step, world size or stage that cannot be.
    """
    text = _dump(state)
    tensors = widest_first(tensors)
    infos = {name: info_of(name, tensor) for name, tensor in tensors.items()}
    _check_names(directory, files)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            stored = {name: _stored(directory / name) for name in files}
            tensors_file = _put_tensors(directory, tensors, infos)
            stored[tensors_file.name] = _stored(tensors_file)
            stored[STATE] = StoredFile(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
            manifest = CheckpointManifest.parse(
                {
                    "format_version": FORMAT_VERSION,
                    "molora_version": VERSION,
                    "step": step,
                    "world_size": world_size,
                    "stage": stage,
                    "files": stored,
                }
            )
            _put_text(directory, STATE, text)
            _seal(directory, manifest)
        finally:
            atomic.tidy(directory, manifest=MANIFEST, tensors=TENSORS, leftover=_is_leftover)
    except OSError as error:
        raise CheckpointError(
            f"{directory} could not be written: {error}. It does not count as a checkpoint; older "
            "ones are untouched. Make room, or choose another directory, and save again."
        ) from error


def read_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint, after the size and the hash of every file have been checked.

    Raises:
        CheckpointError: a directory that is no complete checkpoint; the message names the file.
    """
    try:
        return _read(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}.") from None


def _read(directory: Path) -> Checkpoint:
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    for name, stored in manifest.files.items():
        path = directory / name
        if sha256(path) != stored.sha256:
            raise CheckpointError(
                f"{path} does not have the SHA-256 that {MANIFEST} gives. The file was changed or "
                "damaged. Take an undamaged copy, or an older checkpoint."
            )
    read_header(directory / manifest.tensors_file)
    state = sealed.parse_json(sealed.read_text(directory / STATE), where=str(directory / STATE))
    if not isinstance(state, dict):
        raise CheckpointError(f"{directory / STATE} holds {type(state).__name__}, not a dict.")
    return Checkpoint(
        directory=directory,
        step=manifest.step,
        world_size=manifest.world_size,
        stage=manifest.stage,
        state=state,
        tensors_file=directory / manifest.tensors_file,
    )


def read_manifest(directory: Path) -> CheckpointManifest:
    """`checkpoint.json`, checked by itself.

    Raises:
        CheckpointError: a missing or damaged file, or a newer format.
    """
    return parse_manifest(_contained(directory, MANIFEST))


def parse_manifest(path: Path) -> CheckpointManifest:
    """The manifest in a file of any name; raises as `read_manifest`."""
    return sealed.parse(
        sealed.read_text(path),
        CheckpointManifest,
        where=str(path),
        newest=FORMAT_VERSION,
        remedy="Take an undamaged copy, or an older checkpoint.",
    )


def check_sizes(directory: Path, manifest: CheckpointManifest) -> None:
    """Raise CheckpointError for a file that is missing, a link, or not as long as it was."""
    for name, stored in manifest.files.items():
        path = _contained(directory, name)
        size = path.stat().st_size
        if size != stored.bytes:
            raise CheckpointError(
                f"{path} has {size} bytes, but {MANIFEST} says {stored.bytes}. The file is "
                "truncated or damaged. Take an undamaged copy, or an older checkpoint."
            )


def _check_names(directory: Path, files: Sequence[str]) -> None:
    for name in files:
        if not re.fullmatch(FILE_NAME, name) or name in (MANIFEST, STATE) or TENSORS.match(name):
            raise CheckpointError(
                f"{name!r} cannot be a file that is written before the rest of a checkpoint. Give "
                "plain names of letters, digits, '.', '_' and '-', and none that the checkpoint "
                "has for itself."
            )
        _contained(directory, name)


def _put_tensors(
    directory: Path, tensors: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]
) -> Path:
    return atomic.put(
        directory,
        lambda path: write_tensors(path, tensors, infos),
        lambda path: _tensors_file(sha256(path)),
    )


def _put_text(directory: Path, name: str, text: bytes) -> None:
    atomic.put(directory, lambda path: path.write_bytes(text), lambda _: name)


def _seal(directory: Path, manifest: CheckpointManifest) -> None:
    """Everything that the manifest promises reaches the disk before the manifest does."""
    for name in manifest.files:
        atomic.flush(directory / name)
    atomic.flush(directory.absolute().parent)
    _put_text(directory, MANIFEST, sealed.dump(manifest).encode())


def _is_leftover(path: Path) -> bool:
    """Of a save or a deletion that was killed: only one process writes here."""
    return atomic.is_partial(path) or path.name == DELETED


def _dump(state: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(dict(state), indent=2).encode()
    # ValueError: a value that contains itself; RecursionError: one nested too deeply
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The trainer's state is no JSON: {error}. Store it as tensors, or as plain values."
        ) from None
    if len(text) > sealed.MAX_JSON:
        raise CheckpointError(
            f"The trainer's state has {len(text)} bytes as JSON; {sealed.MAX_JSON} are the most "
            "that is read. Log less often."
        )
    return text


def _tensors_file(sha256: str) -> str:
    return f"trainer-{sha256[:16]}.safetensors"


def _stored(path: Path) -> StoredFile:
    return StoredFile(bytes=path.stat().st_size, sha256=sha256(path))


def _contained(directory: Path, name: str) -> Path:
    return contained(
        directory,
        name,
        what="a checkpoint",
        parts=f"{MANIFEST} and the files that it names",
    )

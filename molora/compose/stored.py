"""Tensors and a JSON file that describes them, in one directory: complete or not at all, and read
with every name, shape, type and hash checked, as a saved mixture is.

`STEM.json` names the tensors' file, `STEM-….safetensors`, whose name is made from its content.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from molora.config.base import Frozen
from molora.errors import CheckpointError
from molora.io import atomic, sealed
from molora.io.files import contained, sha256
from molora.io.header import TensorInfo, read_header
from molora.io.tensors import info_of, map_tensors, widest_first, write_tensors

Model = TypeVar("Model", bound=Frozen)


class TensorsFile(Frozen):
    """What the tensors' file must be."""

    tensors: dict[str, TensorInfo]
    """Every tensor in it."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the file; its name has the first 16 digits."""


def write(
    directory: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    describe: Callable[[TensorsFile], Frozen],
) -> None:
    """Write both files; what was stored there under that stem is replaced, other files stay.

    Raises:
        CheckpointError: NaN or infinity, no such directory to make, a disk that fails; what was
            there before is then still there.
    """
    ordered = widest_first(tensors)
    infos = {name: info_of(name, tensor) for name, tensor in ordered.items()}
    for name, tensor in ordered.items():
        _check_finite(name, tensor)
    description = directory / f"{stem}.json"
    if description.is_symlink() or (description.exists() and not description.is_file()):
        raise CheckpointError(
            f"{description} is a link or a directory, in the place of a file that saving writes. "
            "Remove it, or choose another directory."
        )
    is_new = not directory.exists()
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = atomic.put(
                directory,
                lambda path: write_tensors(path, ordered, infos),
                lambda path: _tensors_name(stem, sha256(path)),
            )
            value = describe(TensorsFile(tensors=infos, sha256=sha256(file)))
            text = sealed.dump(value).encode()
            atomic.put(directory, lambda path: path.write_bytes(text), lambda _: description.name)
        finally:
            _tidy(directory, stem, also_itself=is_new)
    except OSError as error:
        raise CheckpointError(
            f"{directory} could not be written: {error}. Nothing half-written is left there. Make "
            "room, or choose another directory, and save again."
        ) from error


def read(
    directory: Path,
    stem: str,
    kind: type[Model],
    *,
    newest: int,
    check: Callable[[Model], TensorsFile],
) -> tuple[Model, dict[str, Tensor]]:
    """The description, and the tensors that it promises.

    Args:
        directory: where they lie.
        stem: under which they were written.
        kind: what the description is.
        newest: the format version up to which it can be read.
        check: gives the tensors' file of a description, or raises CheckpointError for one that
            cannot be meant, before the tensors are read.

    Raises:
        CheckpointError: missing or damaged files, links, a newer format, anything that differs
            from the description, NaN or infinity.
    """
    path = _contained(directory, stem, f"{stem}.json")
    remedy = "Make it again, or take an undamaged copy."
    text = sealed.read_text(path)
    found = sealed.parse(text, kind, where=str(path), newest=newest, remedy=remedy)
    file = check(found)
    tensors_path = _contained(directory, stem, _tensors_name(stem, file.sha256))
    try:
        if read_header(tensors_path) != file.tensors:
            raise CheckpointError(
                f"{tensors_path} has other tensors than {path.name} lists. The files do not belong "
                "together."
            )
        if sha256(tensors_path) != file.sha256:
            raise CheckpointError(
                f"{tensors_path} does not have the SHA-256 that {path.name} gives. The file was "
                "changed or damaged. Take an undamaged copy."
            )
        mapped = map_tensors(tensors_path, file.tensors)
        # copies: they are small, and whoever replaces the file later does not change them
        tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{tensors_path} cannot be read: {error}.") from None
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    return found, tensors


def expect(where: str, file: TensorsFile, shapes: Mapping[str, tuple[int, ...]]) -> TensorsFile:
    """The file, if it has these float32 tensors and no others; else raise CheckpointError."""
    found = {name: str(info) for name, info in file.tensors.items()}
    wanted = {name: f"float32 {list(shape)}" for name, shape in shapes.items()}
    if found != wanted:
        raise CheckpointError(f"{where} lists tensors {found}, but needs {wanted}. It is damaged.")
    return file


def _tensors_name(stem: str, digest: str) -> str:
    return f"{stem}-{digest[:16]}.safetensors"


def _tidy(directory: Path, stem: str, *, also_itself: bool) -> None:
    description = f"{stem}.json"
    tensors = re.compile(re.escape(stem) + r"-([0-9a-f]{16})\.safetensors")
    atomic.tidy(directory, manifest=description, tensors=tensors, leftover=atomic.is_stale)
    if also_itself and not (directory / description).exists():
        with contextlib.suppress(OSError):
            directory.rmdir()


def _contained(directory: Path, stem: str, name: str) -> Path:
    parts = f"{stem}.json and the safetensors file that it names"
    return contained(directory, name, what=f"stored {stem}", parts=parts)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinity. It is neither saved nor loaded.")

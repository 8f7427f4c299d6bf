"""The two files of a published adapter: found without following links elsewhere, and opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from molora.errors import CheckpointError
from molora.io import torch_file
from molora.io.files import contained
from molora.io.header import TensorInfo, read_header
from molora.io.tensors import map_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
UNSAFE = "adapter_model.bin"
MAX_HEADER = 2**25
"""Bytes of the header of the tensors' file: 150 for each of the most tensors that are read."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A file with tensors: what it says of them, and where they are.

    `loaded` holds them if knowing what there is takes loading them.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    loaded: Mapping[str, Tensor] | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors, on the CPU, over a mapping of the file."""
        return map_tensors(self.path, self.infos) if self.loaded is None else self.loaded


def open_tensors(directory: Path, *, allow_pickle: bool = False) -> Stored:
    """The tensors of an adapter's directory.

    Raises:
        CheckpointError: a file that is missing, leads elsewhere or is damaged, or the other kind of
            file without `allow_pickle`.
    """
    if not (directory / TENSORS).exists() and (directory / UNSAFE).exists():
        if not allow_pickle:
            raise CheckpointError(
                f"{directory} has {UNSAFE}, and reading such a file can run code that it holds. "
                "Load it with package peft where you trust it and save it again, which writes "
                f"{TENSORS}; or give allow_pickle=True, which reads tensors from it and nothing "
                "else."
            )
        path = inside(directory, UNSAFE)
        tensors = torch_file.read_tensors(path)
        return Stored(path, {n: torch_file.info(path, n, t) for n, t in tensors.items()}, tensors)
    path = inside(directory, TENSORS)
    return Stored(path, bounded_header(path))


def bounded_header(path: Path) -> dict[str, TensorInfo]:
    """`read_header` of a header that is at most as long as that of an adapter.

    Raises:
        CheckpointError: a longer header, or as `read_header`.
    """
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > MAX_HEADER:
        raise CheckpointError(
            f"{path} claims a header of {claimed} bytes, and at most {MAX_HEADER} are read. It is "
            "truncated or damaged, or no adapter."
        )
    return read_header(path)


def inside(
    directory: Path, name: str, *, what: str = "a PEFT adapter", parts: str | None = None
) -> Path:
    """`contained`, of the files of an adapter if nothing else is said."""
    return contained(directory, name, what=what, parts=parts or f"{CONFIG} and {TENSORS}")

"""Tensors of a file that `torch.save` wrote, read without running what it may hold.

Only where a caller asks for it: `weights_only` builds tensors and plain containers and refuses the
rest, but its past versions had holes (CVE-2025-32434), and safetensors has no such reader at all.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from molora.errors import CheckpointError
from molora.io.header import DTYPES, TensorInfo

MAX_OBJECTS = 2**26
"""Bytes of the part that says what the tensors are."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named CPU tensors over a mapping of the file.

    Raises:
        CheckpointError: a file of another kind, compressed or too long parts, or anything in it
            that is no named dense tensor.
    """
    _check_archive(path)
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    # whatever the reader makes of hostile bytes; none of it is ours to tell apart
    except Exception as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged: {ascii(str(error))[1:300]}. Save it "
            "as safetensors with package peft where you trust it."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path} holds no named tensors but {type(found).__name__}.")
    size = path.stat().st_size
    for name, tensor in found.items():
        dense = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not dense or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise CheckpointError(f"{path}: {name[:80]!a} is no dense tensor on the CPU.")
        if tensor.nbytes > size:
            raise CheckpointError(f"{path}: {name[:80]!a} is larger than the file.")
    if sum(tensor.nbytes for tensor in found.values()) > size:
        raise CheckpointError(f"{path}: the tensors share memory. Save each for itself.")
    return {name: tensor.detach() for name, tensor in found.items()}


def info(path: Path, name: str, tensor: Tensor) -> TensorInfo:
    """Shape and type of a tensor of `path`.

    Raises:
        CheckpointError: a type that is not read.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES.values():
        raise CheckpointError(f"{path}: {name[:80]!a} is {dtype}, which is not read.")
    return TensorInfo.parse({"shape": tuple(tensor.shape), "dtype": dtype})


def _check_archive(path: Path) -> None:
    """An archive as torch writes it since 1.6: its parts lie in it as they are, so that none can
    be larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is no file as torch writes it since 1.6: {ascii(str(error))[1:200]}. Load and "
            "save it with package peft where you trust it."
        ) from None
    size = path.stat().st_size
    plain = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
    objects = max((p.file_size for p in parts if p.filename.endswith(".pkl")), default=0)
    if not plain or sum(part.file_size for part in parts) > size or objects > MAX_OBJECTS:
        raise CheckpointError(f"{path} has compressed or overlong parts. It is damaged.")

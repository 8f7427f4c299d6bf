"""Named tensors ⇄ a safetensors file, whatever they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from molora.errors import CheckpointError
from molora.io.header import DTYPES, METADATA, TensorInfo, header_bytes


def info_of(name: str, tensor: Tensor) -> TensorInfo:
    """Shape and dtype of a tensor to store.

    Raises:
        CheckpointError: a name or a kind of tensor that such a file cannot hold.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES.values():
        raise CheckpointError(
            f"{name} is {tensor.dtype}; a file stores {', '.join(DTYPES.values())}. Convert it."
        )
    if tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{name} is on {tensor.device} with layout {tensor.layout}; only dense tensors that "
            "have values are stored. Gather or densify it first."
        )
    if name == METADATA or not name.isprintable():
        raise CheckpointError(f"A stored tensor cannot be called {name!a}. Rename it.")
    return TensorInfo.parse({"shape": tuple(tensor.shape), "dtype": dtype})


def widest_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sorted so that each tensor is aligned in the file, and the same set gives the same file."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]
) -> None:
    """A safetensors file, without the copies in memory and the unnamed temporary file that the
    library makes: at most one tensor at a time is copied to the CPU."""
    with path.open("wb") as file:
        file.write(header_bytes(infos))
        for name in infos:
            values = tensors[name].detach().cpu().contiguous()
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)


def map_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """CPU tensors over a mapping of the file: pages are read when they are used.

    Raises:
        SafetensorError, OSError: from reading.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in names}

"""molora's file format: `molora.safetensors` and `molora.json`, strict both ways; knows no
model."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molora.config import MixtureConfig
from molora.config.base import Frozen
from molora.errors import CheckpointError, ConfigError
from molora.io.atomic import atomic_directory

TENSORS = "molora.safetensors"
MANIFEST = "molora.json"
FILES = frozenset({TENSORS, MANIFEST})
FORMAT_VERSION = 1
MAX_HEADER = 100_000_000
"""Bytes; the header of a safetensors file is read before anything else, so its claim is not
trusted."""
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types that a tensor of a mixture may have, as safetensors and torch name them."""


class BaseFingerprint(Frozen):
    """What identifies the base model."""

    name: str
    """Name or path that it was loaded from; for people, not compared."""
    config_sha256: str
    """Hash of its configuration, without names, versions and dtypes."""
    weights_sha256: dict[str, str]
    """Parameter → hash of a sample of its values, rounded to bfloat16."""


class TensorInfo(Frozen):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    """Sizes."""
    dtype: str
    """torch's name."""


class Manifest(Frozen):
    """The JSON file."""

    format_version: int = Field(ge=1)
    """Version of this format."""
    molora_version: str
    """Version that wrote the file."""
    mixture: MixtureConfig
    """The configuration."""
    base: BaseFingerprint
    """The base model that the mixture was trained on."""
    tensors: dict[str, TensorInfo]
    """Every tensor of the file."""
    sha256: str
    """Hash of the tensor file."""


def write(
    directory: Path,
    *,
    state: Mapping[str, Tensor],
    mixture: MixtureConfig,
    base: BaseFingerprint,
    molora_version: str,
) -> None:
    """Write both files, complete or not at all; a mixture saved there before is replaced.

    Raises:
        CheckpointError: a tensor with NaN or infinity, or a directory that holds other files.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    with atomic_directory(directory, ours=FILES) as temporary:
        save_file(tensors, temporary / TENSORS)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            molora_version=molora_version,
            mixture=mixture,
            base=base,
            tensors={name: _info(tensor) for name, tensor in tensors.items()},
            sha256=sha256(temporary / TENSORS),
        )
        (temporary / MANIFEST).write_text(
            manifest.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )


def read_manifest(directory: Path) -> Manifest:
    """The checked JSON file.

    Raises:
        CheckpointError: a missing or damaged file, or a newer format.
    """
    path = _contained(directory, MANIFEST)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this molora reads up to {FORMAT_VERSION}. "
            "Upgrade molora."
        )
    try:
        return Manifest.parse(data)
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def read_tensors(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors, after the header, every shape, every dtype and the hash have been checked.

    Raises:
        CheckpointError: anything that differs from the manifest, NaN or infinity; each names the
            file or tensor.
    """
    path = _contained(directory, TENSORS)
    found = read_header(path)
    for name, info in manifest.tensors.items():
        if name not in found:
            raise CheckpointError(
                f"{path} lacks the tensor {name!r} that {MANIFEST} lists. The files do not belong "
                "together."
            )
        if found[name] != info:
            raise CheckpointError(f"{path}: {name} is {found[name]}, but {MANIFEST} says {info}.")
    extra = next((name for name in found if name not in manifest.tensors), None)
    if extra is not None:
        raise CheckpointError(f"{path} has a tensor {extra!r} that {MANIFEST} does not list.")
    if sha256(path) != manifest.sha256:
        raise CheckpointError(
            f"{path} does not have the SHA-256 that {MANIFEST} gives. The file was changed or "
            "damaged."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a safetensors file, from its header alone.

    Raises:
        CheckpointError: a file that is no safetensors file, is cut short or longer than its header
            says, or has types that a mixture does not have.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: its header claims {length} bytes."
            )
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header: {error}.") from None
    try:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        infos = {
            name: TensorInfo(shape=tuple(e["shape"]), dtype=DTYPES[e["dtype"]])
            for name, e in entries.items()
        }
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} has a header that no mixture has: {error!r}.") from None
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, but its header describes {8 + length + end}. The file is "
            "truncated or damaged."
        )
    return infos


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if the tensor holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinity. It is neither saved nor loaded.")


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def _contained(directory: Path, name: str) -> Path:
    """The file in the directory itself: a link could lead anywhere."""
    path = directory / name
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory with a saved mixture.")
    if path.is_symlink() or path.resolve().parent != directory.resolve():
        raise CheckpointError(f"{path} is a link. A saved mixture holds its files itself.")
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {name}. A saved mixture has {MANIFEST} and {TENSORS}."
        )
    return path

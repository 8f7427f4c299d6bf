"""molora's file format, a safetensors file and `molora.json`: strict both ways; knows no model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from molora.config import MixtureConfig
from molora.errors import CheckpointError
from molora.io import atomic
from molora.io import manifest as manifests
from molora.io.files import contained, sha256
from molora.io.header import FLOATS, read_header
from molora.io.manifest import FORMAT_VERSION, BaseFingerprint, Manifest, tensors_file
from molora.io.tensors import info_of, map_tensors, widest_first, write_tensors

MANIFEST = "molora.json"
TENSORS = re.compile(r"molora-([0-9a-f]{16})\.safetensors")
"""Names of tensor files; the manifest says which one counts."""


def write(
    directory: Path,
    *,
    state: Mapping[str, Tensor],
    mixture: MixtureConfig,
    base: BaseFingerprint,
    molora_version: str,
) -> None:
    """Write both files, complete or not at all; a mixture saved there before is replaced.

    One process saves to a directory at a time, or several the same mixture.

    Raises:
        CheckpointError: a tensor that is empty or holds NaN or infinity, a path that is no
            directory, a disk that fails. A mixture that was there before is then still there.
    """
    tensors = _storable(state)
    check_writable(directory)
    is_new = not directory.exists()
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _write(directory, tensors, mixture=mixture, base=base, molora_version=molora_version)
        finally:
            _tidy(directory, also_itself=is_new)
    except OSError as error:
        raise CheckpointError(
            f"{directory} could not be written: {error}. No half-written mixture is left there. "
            "Make room, or choose another directory, and save again."
        ) from error


def read_manifest(directory: Path) -> Manifest:
    """The checked JSON file.

    Raises:
        CheckpointError: a missing or damaged file, or a newer format.
    """
    return manifests.read_manifest(_contained(directory, MANIFEST))


def read_tensors(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors, after the header, every shape, every dtype and the hash have been checked.

    Raises:
        CheckpointError: anything that differs from the manifest, NaN or infinity; each names the
            file or tensor.
    """
    path = _contained(directory, manifest.tensors_file)
    try:
        _check_header(path, manifest)
        if sha256(path) != manifest.sha256:
            raise CheckpointError(
                f"{path} does not have the SHA-256 that {MANIFEST} gives. The file was changed or "
                "damaged. Take an undamaged copy."
            )
        tensors = map_tensors(path, manifest.tensors)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    return tensors


def check_writable(directory: Path) -> None:
    """Raise CheckpointError if a mixture could not be saved in `directory`, as far as names tell.

    Other files may lie there: a save touches only those that it names itself.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory. Choose another place to save to.")
    manifest = directory / MANIFEST
    if manifest.is_symlink() or (manifest.exists() and not manifest.is_file()):
        raise CheckpointError(
            f"{manifest} is a link or a directory, in the place of a file that saving writes. "
            "Remove it, or choose another directory."
        )


def _write(
    directory: Path,
    tensors: dict[str, Tensor],
    *,
    mixture: MixtureConfig,
    base: BaseFingerprint,
    molora_version: str,
) -> None:
    infos = {name: info_of(name, tensor) for name, tensor in tensors.items()}
    file = atomic.put(
        directory,
        lambda path: write_tensors(path, tensors, infos),
        lambda path: tensors_file(sha256(path)),
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        molora_version=molora_version,
        mixture=mixture,
        base=base,
        tensors=infos,
        sha256=sha256(file),
    )
    text = manifests.dump_manifest(manifest).encode()
    atomic.put(directory, lambda path: path.write_bytes(text), lambda _: MANIFEST)


def _tidy(directory: Path, *, also_itself: bool) -> None:
    """Delete tensor files that the manifest does not name and what killed saves left.

    `also_itself`: and the directory, if it is empty then.
    """
    atomic.tidy(directory, manifest=MANIFEST, tensors=TENSORS, leftover=atomic.is_stale)
    if also_itself and not (directory / MANIFEST).exists():
        with contextlib.suppress(OSError):
            directory.rmdir()


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, after every check that saving needs, in the order of the file."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in widest_first(state).items():
        if tensor.numel() == 0:
            raise CheckpointError(
                f"{name} is empty, as partitioned parameters are. Gather the parameters of the "
                "mixture and save inside, e.g. under deepspeed.zero.GatheredParameters."
            )
        if str(tensor.dtype).removeprefix("torch.") not in FLOATS.values():
            raise CheckpointError(
                f"{name} is {tensor.dtype}; a mixture stores {', '.join(FLOATS.values())}."
            )
        _check_finite(name, tensor)
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _check_header(path: Path, manifest: Manifest) -> None:
    found = read_header(path)
    for name, info in manifest.tensors.items():
        if name not in found:
            raise CheckpointError(
                f"{path} lacks the tensor {name!r} that {MANIFEST} lists. The files do not belong "
                "together."
            )
        if found[name] != info:
            raise CheckpointError(f"{path}: {name!r} is {found[name]}, but {MANIFEST} says {info}.")
    extra = next((name for name in found if name not in manifest.tensors), None)
    if extra is not None:
        raise CheckpointError(f"{path} has a tensor {extra!r} that {MANIFEST} does not list.")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinity. It is neither saved nor loaded.")


def _contained(directory: Path, name: str) -> Path:
    return contained(
        directory,
        name,
        what="a saved mixture",
        parts=f"{MANIFEST} and the safetensors file that it names",
    )

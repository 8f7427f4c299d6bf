"""A directory that package peft saved → the factors of one frozen expert, mapped from the file.

Everything that the files say is checked before values are read; the values are checked without a
copy in memory. Nothing in the directory is written, and links in it are not followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from torch import Tensor

from molora.errors import CheckpointError
from molora.io.files import contained, sha256
from molora.io.header import TensorInfo, read_header
from molora.io.peft_config import ambiguous_alphas, ranks_and_scalings, read_config
from molora.io.peft_keys import PartNames, check_parts, check_shapes, examples, part_names
from molora.io.peft_targets import target_differences
from molora.io.tensors import map_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
UNSAFE = "adapter_model.bin"
MAX_HEADER = 2**25
"""Bytes of the header of the tensors' file: 150 for each of the most tensors that are read."""
MAX_RANK = 512
"""Rank of a factor, unless the caller allows more."""
MAX_NORM = 1e6
"""Of scaling · B A in the Frobenius norm; a weight of the largest models has less than 1e4."""


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """How an adapter acts on one module: y += scaling · (B A x + bias).

    Attributes:
        lora_A: (R, in), in the type of the file.
        lora_B: (out, R).
        scaling: alpha / R, or alpha / sqrt(R) with rsLoRA, by the patterns that hold here.
        update_norm: Frobenius norm of scaling · B A.
        bias: (out,), with `lora_bias`.
        magnitude: (out,), with DoRA (arXiv 2402.09353, eq. 5): with c the magnitude over the norms
            of the rows of W + scaling · B A, y += (c - 1) ∘ W x + c ∘ scaling · B A x.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    update_norm: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter as it was read.

    Attributes:
        source: the directory.
        modules: by the module's name in the base, in the order of the file.
        base: the base as the trainer called it; None if it was not said.
        revision: the base's revision; None if it was not said.
        fan_in_fan_out: the adapted weights of the base are (in, out); for merging only.
        sha256: of the file with the tensors.
        notes: what was set aside, and where configuration and tensors differ.
        invocation_tokens: token ids of an activated LoRA (arXiv 2504.12397): the adapter acts from
            the start of the last place where they follow each other, and nowhere without one. None:
            it acts everywhere.
    """

    source: Path
    modules: Mapping[str, AdapterModule]
    base: str | None
    revision: str | None
    fan_in_fan_out: bool
    sha256: str
    notes: tuple[str, ...]
    invocation_tokens: tuple[int, ...] | None = None


def read_adapter(directory: Path, *, max_rank: int = MAX_RANK) -> Adapter:
    """The LoRA of a directory of package peft. The tensors stay in the file until used, which
    must not be changed meanwhile; writing to them leaves it as it is.

    Raises:
        CheckpointError: files that are missing, links, damaged, or hold something else than LoRA
            factors.
        ConfigError: settings that cannot be, or that are not supported.
    """
    try:
        return _read(directory, max_rank)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory} cannot be read: {error}.") from None


def _read(directory: Path, max_rank: int) -> Adapter:
    path = _tensors_file(directory)
    config, notes = read_config(_contained(directory, CONFIG))
    header = _header(path)
    parts = part_names(path, header)
    check_parts(path, parts, lora_bias=config.lora_bias, use_dora=config.use_dora)
    where = str(directory / CONFIG)
    resolved = ranks_and_scalings(config, list(parts), where=where)
    ranks = {module: rank for module, (rank, _) in resolved.items()}
    check_shapes(path, header, parts, ranks, max_rank=max_rank)
    notes += target_differences(config, list(parts), where=where)
    ambiguous = ambiguous_alphas(config, list(parts), where=where)
    if ambiguous:
        notes.append(
            f"the order in alpha_pattern decides at {examples(ambiguous)}; peft sorts it when it "
            "saves, so that the adapter may have been trained with another alpha"
        )
    digest = sha256(path)
    tensors = map_tensors(path, header)
    modules = {
        module: _module(path, module, names, tensors, resolved[module][1])
        for module, names in parts.items()
    }
    silent = [name for name, module in modules.items() if module.update_norm == 0]
    if silent:
        notes.append(f"the update is zero at {examples(silent)}")
    if (directory / UNSAFE).exists():
        notes.append(f"{UNSAFE} was not read")
    return Adapter(
        source=directory,
        modules=MappingProxyType(modules),
        base=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=config.fan_in_fan_out,
        sha256=digest,
        notes=tuple(notes),
        invocation_tokens=tuple(config.alora_invocation_tokens or ()) or None,
    )


def _tensors_file(directory: Path) -> Path:
    if (directory / UNSAFE).exists() and not (directory / TENSORS).exists():
        raise CheckpointError(
            f"{directory} has {UNSAFE}, and reading such a file can run code that it holds. "
            "Load it with package peft where you trust it and save it again, which writes "
            f"{TENSORS}."
        )
    return _contained(directory, TENSORS)


def _contained(directory: Path, name: str) -> Path:
    if (directory / name).is_symlink():
        raise CheckpointError(
            f"{directory / name} is a link, as in the hub's cache, and could lead anywhere. Copy "
            "the directory with the files themselves, e.g. with `cp -rL`, and give the copy."
        )
    return contained(directory, name, what="a PEFT adapter", parts=f"{CONFIG} and {TENSORS}")


def _header(path: Path) -> dict[str, TensorInfo]:
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > MAX_HEADER:
        raise CheckpointError(
            f"{path} claims a header of {claimed} bytes, and at most {MAX_HEADER} are read. It is "
            "truncated or damaged, or no adapter."
        )
    return read_header(path)


def _module(
    path: Path, module: str, names: PartNames, tensors: Mapping[str, Tensor], scaling: float
) -> AdapterModule:
    """Raises CheckpointError for values that are not finite or out of every measure."""
    lora_A, lora_B = tensors[names.lora_A], tensors[names.lora_B]
    norm = _update_norm(lora_A, lora_B, scaling)
    if not math.isfinite(norm):
        finite = bool(torch.isfinite(lora_A).all())
        raise CheckpointError(
            f"{path}: {'lora_B' if finite else 'lora_A'} of {module} holds NaN or infinity. Take "
            "an undamaged copy."
        )
    _check_norm(path, f"the update of {module}", norm)
    for setting, name in names.vectors:
        vector_norm = float(tensors[name].double().norm())
        if not math.isfinite(vector_norm):
            raise CheckpointError(
                f"{path}: {name!a} holds NaN or infinity. Take an undamaged copy."
            )
        vector_norm *= abs(scaling) if setting == "lora_bias" else 1
        _check_norm(path, ascii(name), vector_norm)
    bias = None if names.bias is None else tensors[names.bias]
    magnitude = None if names.magnitude is None else tensors[names.magnitude]
    return AdapterModule(lora_A, lora_B, scaling, norm, bias, magnitude)


def _check_norm(path: Path, what: str, norm: float) -> None:
    if not norm <= MAX_NORM:
        raise CheckpointError(
            f"{path}: {what} has the norm {norm:.3g}, at most {MAX_NORM:g} can be meant: no weight "
            "is as large, and routers that go by norms would follow it alone. Take an undamaged "
            "copy."
        )


def _update_norm(lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """‖scaling · B A‖ from the R × R products: ‖B A‖² = Σ (AAᵀ) ∘ (BᵀB).

    Every value is squared in the products, and no square of a finite one overflows in float64: the
    norm is finite exactly if the factors are.
    """
    a_RD, b_FR = lora_A.double(), lora_B.double()
    squared = ((a_RD @ a_RD.T) * (b_FR.T @ b_FR)).sum()
    # below 0 by rounding only; NaN stays
    return abs(scaling) * math.sqrt(float(squared.clamp_min(0)))

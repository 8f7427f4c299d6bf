"""PHATGOOSE's gate vectors (arXiv 2402.05859), in a format of our own: there is no public one.

`phatgoose_gates.safetensors` lies beside an adapter and has one tensor `MODULE.gate` (in,) for each
module that the adapter has, float32, float16 or bfloat16, and no other. It is v of the paper: the
expert was trained with its output times σ(v·x), and is routed to by LN(v)·LN(x) / sqrt(in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from torch import Tensor

from molora.errors import CheckpointError
from molora.io import atomic
from molora.io.adapter import Adapter
from molora.io.peft_files import bounded_header, inside
from molora.io.peft_keys import MAX_NAME, MODULE, TYPES, examples, shown
from molora.io.tensors import info_of, map_tensors, widest_first, write_tensors

GATES = "phatgoose_gates.safetensors"
END = ".gate"


def read_gate_vectors(
    directory: Path, *, adapter: Adapter | None = None
) -> MappingProxyType[str, Tensor]:
    """module → v (in,), over a mapping of the file.

    Args:
        directory: with the file.
        adapter: whose modules and sizes they must be.

    Raises:
        CheckpointError: a file that is missing, damaged or has something else, or of another
            adapter.
    """
    path = inside(directory, GATES, what="a set of gate vectors", parts=GATES)
    try:
        infos = bounded_header(path)
        for name, info in infos.items():
            module = name.removesuffix(END)
            known = module != name and len(name) <= MAX_NAME and MODULE.fullmatch(module)
            if not known or info.dtype not in TYPES or len(info.shape) != 1 or 0 in info.shape:
                raise CheckpointError(
                    f"{path}: {name[:MAX_NAME]!a} is {shown(info)}; it has MODULE{END} (in,) of "
                    f"{', '.join(TYPES)} only."
                )
        stored = map_tensors(path, infos)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    vectors = {name.removesuffix(END): vector for name, vector in stored.items()}
    _check(str(path), vectors)
    if adapter is not None:
        check_gate_vectors(vectors, adapter, where=str(path))
    return MappingProxyType(vectors)


def write_gate_vectors(
    directory: Path, vectors: Mapping[str, Tensor], *, adapter: Adapter | None = None
) -> Path:
    """Write module → v (in,) into a directory, completely or not at all; the file.

    Raises:
        CheckpointError: what could not be read again, or a disk that fails.
    """
    where = str(directory / GATES)
    _check(where, vectors)
    if adapter is not None:
        check_gate_vectors(vectors, adapter, where=where)
    tensors = widest_first({f"{module}{END}": vector for module, vector in vectors.items()})
    infos = {name: info_of(name, vector) for name, vector in tensors.items()}
    try:
        return atomic.put(
            directory, lambda path: write_tensors(path, tensors, infos), lambda _: GATES
        )
    except OSError as error:
        raise CheckpointError(f"{where} could not be written: {error}.") from error


def check_gate_vectors(vectors: Mapping[str, Tensor], adapter: Adapter, *, where: str) -> None:
    """Raise CheckpointError unless there is one vector of the input's size for each module."""
    sizes = {name: module.lora_A.shape[1] for name, module in adapter.modules.items()}
    differing = sorted({*vectors} ^ {*sizes}) or [
        name for name, vector in vectors.items() if vector.numel() != sizes[name]
    ]
    if differing:
        raise CheckpointError(
            f"{where}: gate vectors and the modules of {adapter.source} differ at "
            f"{examples(differing)}. Train them with this adapter."
        )


def _check(where: str, vectors: Mapping[str, Tensor]) -> None:
    if not vectors:
        raise CheckpointError(f"{where} has no gate vectors.")
    for module, vector in vectors.items():
        kind = str(vector.dtype).removeprefix("torch.")
        if not MODULE.fullmatch(module) or vector.dim() != 1 or kind not in TYPES:
            raise CheckpointError(
                f"{where}: {module[:80]!a} {list(vector.shape)} of {kind} is no gate vector."
            )
        if not math.isfinite(float(vector.double().norm())):
            raise CheckpointError(f"{where}: the vector of {module} holds NaN or infinity.")

"""LoRA in the names of kohya's scripts and of diffusers → an adapter with the base's names.

kohya: `PREFIX_PATH.lora_down.weight`, `.lora_up.weight` and `.alpha`, with the path's dots written
as underscores; only the base's own names say which were dots. diffusers: `PATH.lora.down.weight`,
`PATH_lora.down.weight` or `PATH.lora_linear_layer.down.weight`, with a prefix such as `unet.`.
down is A, up is B, scaling is alpha / R, or 1 without alpha.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from torch import Tensor

from molora.errors import CheckpointError
from molora.io.adapter import Adapter, AdapterModule
from molora.io.files import sha256
from molora.io.header import TensorInfo
from molora.io.peft_adapter import MAX_RANK
from molora.io.peft_files import bounded_header
from molora.io.peft_keys import MAX_NAME, MAX_TENSORS, PartNames, check_shapes, examples
from molora.io.peft_values import checked_module
from molora.io.tensors import map_tensors

NAME = re.compile(
    r"(?P<path>.+?)"
    r"(?:\.lora_(?P<flat>down|up)\.weight|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<part>down|up)"
    r"\.weight|\.(?P<alpha>alpha))"
)
PREFIX = re.compile(r"lora_[a-z]+\d*(?=_)|[^.]+(?=\.)")
"""What stands before a path: `lora_unet`, `lora_te1`, or the first of dotted names."""
MAX_ALPHA = 1e9


def read_kohya(
    file: Path, *, modules: Iterable[str], prefix: str | None = None, max_rank: int = MAX_RANK
) -> Adapter:
    """The adapter in one safetensors file. The tensors stay in the file until used.

    Args:
        file: with tensors of these names.
        modules: names of the base's modules, which decide what a name means.
        prefix: which part of the file to read, "lora_unet" or "unet", where it adapts several
            models; other parts are noted. None: names have no prefix, or all the same.
        max_rank: the largest rank to accept.

    Raises:
        CheckpointError: a file that cannot be read, or names and shapes that are no LoRA of linear
            layers of this base.
    """
    try:
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file} is no file, or a link.")
        infos = bounded_header(file)
        found, others = _by_module(file, infos, _Names(modules), prefix)
        parts = {module: _complete(file, module, names) for module, names in found.items()}
        ranks = {module: (*infos[names.lora_A].shape, 0)[0] for module, names in parts.items()}
        check_shapes(file, infos, parts, ranks, max_rank=max_rank)
        tensors = map_tensors(file, infos)
        read: dict[str, AdapterModule] = {}
        for module, names in parts.items():
            alpha = found[module].get("alpha")
            scaling = 1.0 if alpha is None else _alpha(file, alpha, tensors[alpha]) / ranks[module]
            read[module] = checked_module(file, module, names, tensors, scaling)
        digest = sha256(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from None
    notes = [f"left out, of another prefix: {examples(others)}"] if others else []
    return Adapter(
        source=file,
        modules=MappingProxyType(read),
        base=None,
        revision=None,
        fan_in_fan_out=False,
        sha256=digest,
        notes=tuple(notes),
    )


class _Names:
    """The base's modules by their names, and by those with underscores for dots."""

    def __init__(self, modules: Iterable[str]) -> None:
        self.dotted = {*modules}
        self.flat: dict[str, list[str]] = {}
        for module in self.dotted:
            self.flat.setdefault(module.replace(".", "_"), []).append(module)

    def resolved(self, path: str) -> tuple[str | None, list[str]]:
        """(prefix, modules that the path may mean)."""
        path = path.replace(".processor.", ".")
        begin = PREFIX.match(path)
        rests: list[tuple[str | None, str]] = [(None, path)]
        if begin is not None:
            rests.append((begin[0], path[begin.end() + 1 :]))
        for prefix, rest in rests:
            found = self.flat.get(rest, [rest] if rest in self.dotted else [])
            if found:
                return prefix, found
        return rests[-1][0], []


def _by_module(
    file: Path, infos: Mapping[str, TensorInfo], names: _Names, prefix: str | None
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(module → part → name in the file, names of other prefixes)."""
    if not 1 <= len(infos) <= MAX_TENSORS:
        raise CheckpointError(f"{file} holds {len(infos)} tensors, which is no adapter.")
    found: dict[str, dict[str, list[str]]] = {}
    others: list[str] = []
    prefixes: dict[str | None, str] = {}
    for name in infos:
        part = NAME.fullmatch(name) if len(name) <= MAX_NAME else None
        if part is None:
            raise CheckpointError(
                f"{file}: {name[:MAX_NAME]!a} is no part of LoRA by the names of kohya or of "
                "diffusers. LoHa, LoKr, DoRA and whole layers are not read."
            )
        own, meant = names.resolved(part["path"])
        if prefix is not None and own != prefix:
            others.append(name)
            continue
        if len(meant) != 1:
            wrong = f"may mean {examples(meant)}" if meant else "means no module of the base"
            raise CheckpointError(f"{file}: {name!a} {wrong}. Give the base it was trained on.")
        prefixes[own] = name
        kind = part["alpha"] or part["flat"] or part["part"]
        found.setdefault(meant[0], {}).setdefault(kind, []).append(name)
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{file} adapts several models, or none of the prefix {prefix!a}: "
            f"{examples([*prefixes.values(), *others])}. Give one of their prefixes."
        )
    return {module: _single(file, parts) for module, parts in found.items()}, others


def _single(file: Path, parts: Mapping[str, list[str]]) -> dict[str, str]:
    for names in parts.values():
        if len(names) > 1:
            raise CheckpointError(f"{file}: {examples(names)} are the same part. Remove one.")
    return {kind: name for kind, (name,) in parts.items()}


def _complete(file: Path, module: str, parts: Mapping[str, str]) -> PartNames:
    if "down" not in parts or "up" not in parts:
        raise CheckpointError(
            f"{file} has only {', '.join(parts)} of {module}. The file is incomplete."
        )
    return PartNames(lora_A=parts["down"], lora_B=parts["up"])


def _alpha(file: Path, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(float(tensor)) or abs(float(tensor)) > MAX_ALPHA:
        raise CheckpointError(f"{file}: {name!a} is no number of at most {MAX_ALPHA:g}.")
    return float(tensor)

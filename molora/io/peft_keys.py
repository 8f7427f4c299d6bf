"""Names of tensors in a published adapter: which module and factor each is, or why it is refused.

A file of package peft has `base_model.model.MODULE.lora_A.weight` and `….lora_B.weight`, and with
some settings `….lora_B.bias` or `….lora_magnitude_vector`. State dicts saved in other ways also
carry the adapter's name (`lora_A.default.weight`), lack the prefix, or hold the names of wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from molora.errors import CheckpointError
from molora.io.header import TensorInfo

PREFIX = "base_model.model."
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Segments that compiling, sharding and checkpointing put into names."""
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
PARTS = {
    ("lora_A", "weight"): "lora_A",
    ("lora_B", "weight"): "lora_B",
    ("lora_B", "bias"): "bias",
    # the first is what a file has, the second a state dict
    ("lora_magnitude_vector", None): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
}
"""What the end of a name says, and what it is called here."""
MODULE = re.compile(r"(?!__)[A-Za-z0-9_-]+(?:\.(?!__)[A-Za-z0-9_-]+)*")
"""Names of modules that are accepted."""
MAX_NAME = 512
"""Characters of a tensor's name."""
MAX_TENSORS = 200_000
"""Tensors in one adapter."""
TYPES = ("float32", "float16", "bfloat16")
"""Types of factors."""
LATER = "Experts are updates of linear layers; train an adapter without it."
UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"\.lora_A(\..+)?\.bias$", "a bias within a factor, which no version of peft writes."),
    (r"\.lora_diag\b", f"KaSA's diagonal. {LATER}"),
    (r"\bbase_layer\..*lora_", "a factor of a part of an attention that torch fuses. Convert it to "
     "an adapter of plain linear layers."),
    (r"internal_xlora_classifier", "X-LoRA's router. Name the directories of its adapters."),
)  # fmt: skip
"""Patterns of names that are recognised and refused, and what they are."""
REPLACING: tuple[tuple[str, str], ...] = (
    (r"\.lora_embedding_[AB]\b", "a factor of an embedding"),
    (r"token_adapter|trainable_tokens", "rows that replace an embedding's"),
    (r"\.bias$", "a trained bias of the base"),
    (r"", "a copy of the base's own tensor (modules_to_save, or an embedding of another size)"),
)
"""Likewise, of what an adapter has beside its updates of linear layers; the last is all else."""
CHOICES = (
    "no mixture can weigh that. Train an adapter without it, or give leave_out=True, which takes "
    "the updates of linear layers alone: another function than was trained"
)


@dataclass(frozen=True)
class PartNames:
    """The names in the file of one module's tensors."""

    lora_A: str
    lora_B: str
    bias: str | None = None
    magnitude: str | None = None

    @property
    def vectors(self) -> tuple[tuple[str, str], ...]:
        """(which setting makes peft save it, name) of those beside the factors."""
        both = ("lora_bias", self.bias), ("use_dora", self.magnitude)
        return tuple((setting, name) for setting, name in both if name is not None)


def part_names(
    path: Path, header: Mapping[str, TensorInfo], *, leave_out: bool = False
) -> tuple[dict[str, PartNames], list[str]]:
    """(module → the names of its tensors in the file, in the order of the file; notes).

    `leave_out`: tensors beside the updates of linear layers are named in a note.

    Raises:
        CheckpointError: a name that is no part of LoRA, two tensors for one part, parts of several
            adapters, or one factor without the other; each names the tensor.
    """
    if not header or len(header) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} holds {len(header)} tensors; an adapter has 2 to {MAX_TENSORS}. It is "
            "damaged, or no adapter."
        )
    found: dict[str, dict[str, str]] = {}
    adapters: dict[tuple[str | None, bool], str] = {}
    others: dict[str, list[str]] = {}
    for name in header:
        split = _split(path, name)
        if isinstance(split, str):
            if not leave_out:
                raise CheckpointError(f"{path}: {name!a} is {split}, and {CHOICES}.")
            others.setdefault(split, []).append(name)
            continue
        module, part, adapter = split
        parts = found.setdefault(module, {})
        if part in parts:
            raise CheckpointError(
                f"{path}: {parts[part]!a} and {name!a} are both {part} of {module}. "
                "Remove one of them."
            )
        parts[part] = name
        adapters[adapter] = name
    if len(adapters) > 1:
        first, second = list(adapters.values())[:2]
        raise CheckpointError(
            f"{path}: {first!a} and {second!a} are not of one adapter: names differ in the "
            "adapter's name or in the prefix. Save each adapter into a directory of its own."
        )
    if not found:
        raise CheckpointError(f"{path} has no factors of a linear layer, so that nothing is left.")
    notes = [f"left out: {examples(names)}, {what}" for what, names in others.items()]
    return {module: _complete(path, module, parts) for module, parts in found.items()}, notes


def _split(path: Path, name: str) -> tuple[str, str, tuple[str | None, bool]] | str:
    """(module, part, what all names of one adapter have in common), or what of REPLACING it is."""
    if len(name) > MAX_NAME:
        raise CheckpointError(
            f"{path}: a name has {len(name)} characters, at most {MAX_NAME}: {name[:80]!a}…. "
            "The file is damaged."
        )
    bare = WRAPPERS.sub("", name)
    bare = bare.removeprefix("module.") if bare.startswith(f"module.{PREFIX}") else bare
    prefixed = bare.startswith(PREFIX)
    bare = bare.removeprefix(PREFIX)
    found = FACTOR.fullmatch(bare)
    part = PARTS.get((found["part"], found["kind"])) if found else None
    module = found["module"] if found else ""
    while module.endswith(".base_layer"):  # a parameter within a module that has another
        module = module.removesuffix(".base_layer")
    if found is None or part is None or "base_layer" in module.split("."):
        refused = [what for pattern, what in UNSUPPORTED if re.search(pattern, bare)]
        if refused:
            raise CheckpointError(f"{path}: {name!a} is {refused[0]}")
        return next(what for pattern, what in REPLACING if re.search(pattern, bare))
    if not MODULE.fullmatch(found["module"]):
        raise CheckpointError(
            f"{path}: {name!a} names no module: names are letters, digits, '_', '-', and dots "
            "between them. The file is damaged."
        )
    return found["module"], part, (found["adapter"], prefixed)


def _complete(path: Path, module: str, parts: Mapping[str, str]) -> PartNames:
    for factor in ("lora_A", "lora_B"):
        if factor not in parts:
            raise CheckpointError(
                f"{path} has {', '.join(parts)} of {module} but no {factor}: the expert would do "
                "nothing there. The file is incomplete; take an undamaged copy."
            )
    return PartNames(**parts)


def check_parts(
    path: Path, parts: Mapping[str, PartNames], *, lora_bias: bool, use_dora: bool
) -> None:
    """Raise CheckpointError unless each module has the vectors that these settings of the
    configuration make package peft save: it would leave out what it does not expect, and make up
    what it lacks."""
    settings = {"lora_bias": lora_bias, "use_dora": use_dora}
    for module, names in parts.items():
        present = dict(names.vectors)
        for setting, expected in settings.items():
            if expected is not (setting in present):
                raise CheckpointError(
                    f"{path} has {'no' if expected else 'a'} "
                    f"{'lora_B.bias' if setting == 'lora_bias' else 'lora_magnitude_vector'} of "
                    f"{module}, but {setting} is {expected} in adapter_config.json. The files do "
                    "not belong together; take both from one save."
                )


def check_shapes(
    path: Path,
    header: Mapping[str, TensorInfo],
    parts: Mapping[str, PartNames],
    ranks: Mapping[str, int],
    *,
    max_rank: int,
) -> None:
    """Raise CheckpointError unless A is (R, in), B is (out, R) and vectors are (out,), of floats,
    with R the rank that the configuration gives and at most `max_rank`."""
    for module, names in parts.items():
        a, b = header[names.lora_A], header[names.lora_B]
        for name in (names.lora_A, names.lora_B):
            info = header[name]
            if info.dtype not in TYPES or len(info.shape) != 2 or 0 in info.shape:
                raise CheckpointError(
                    f"{path}: {name!a} is {shown(info)}; factors are matrices of "
                    f"{', '.join(TYPES)}, none of size 0. Convolutions and quantised factors are "
                    "not read; convert the adapter."
                )
        if a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{path}: lora_A of {module} has {a.shape[0]} rows, lora_B {b.shape[1]} columns; "
                "both are the rank. The file is damaged, or adapts a convolution."
            )
        if a.shape[0] > max_rank:
            raise CheckpointError(
                f"{path}: {module} has rank {a.shape[0]}, at most {max_rank} are loaded. Give a "
                "larger max_rank if this is meant."
            )
        if a.shape[0] != ranks[module]:
            raise CheckpointError(
                f"{path}: {module} has rank {a.shape[0]}, but adapter_config.json gives "
                f"{str(ranks[module])[:20]}, and the scaling follows from it. The files do not "
                "belong together; take both from one save."
            )
        for _, name in names.vectors:
            if header[name].dtype not in TYPES or header[name].shape != b.shape[:1]:
                raise CheckpointError(
                    f"{path}: {name!a} is {shown(header[name])}; it has one of "
                    f"{', '.join(TYPES)} for each of the {b.shape[0]} rows of lora_B. The file is "
                    "damaged."
                )


def shown(info: TensorInfo) -> str:
    """A type and shape, for messages."""
    return str(info)[:100]


def examples(names: Iterable[str]) -> str:
    """Three names and how many there are, for messages."""
    every = [ascii(name)[1:-1][:80] for name in names]
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more

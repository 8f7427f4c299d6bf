"""Names of tensors in a published adapter: which module and factor each is, or why it is refused.

A file of package peft has `base_model.model.MODULE.lora_A.weight` and `….lora_B.weight`. State
dicts saved in other ways also carry the adapter's name (`lora_A.default.weight`), lack the prefix,
or hold the names of wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from molora.errors import CheckpointError
from molora.io.header import TensorInfo

PREFIX = "base_model.model."
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Segments that compiling, sharding and checkpointing put into names."""
FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
MODULE = re.compile(r"(?!__)[A-Za-z0-9_-]+(?:\.(?!__)[A-Za-z0-9_-]+)*")
"""Names of modules that are accepted."""
MAX_NAME = 512
"""Characters of a tensor's name."""
MAX_TENSORS = 200_000
"""Tensors in one adapter."""
TYPES = ("float32", "float16", "bfloat16")
"""Types of factors."""
LATER = "This version of molora reads plain LoRA factors only."
UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"\.lora_magnitude_vector\b", f"DoRA's scale of rows. {LATER}"),
    (r"\.lora_embedding_[AB]\b", f"a factor of an embedding. {LATER}"),
    (r"\.lora_[AB](\..+)?\.bias$", f"a bias beside a factor (lora_bias). {LATER}"),
    (r"\.lora_diag\b", f"KaSA's diagonal. {LATER}"),
    (r"token_adapter|trainable_tokens", "rows that replace an embedding's. Train without them."),
    (r"\bbase_layer\..*lora_", f"a factor of a parameter within a module. {LATER}"),
    (r"internal_xlora_classifier", "X-LoRA's router. Name the directories of its adapters."),
    (r"\.bias$", 'a trained bias of the base. Train an adapter with bias="none".'),
    (r"", "a copy of the base's own tensor (modules_to_save, or an embedding of another size), "
     "which no mixture can weigh. Train an adapter without it."),
)  # fmt: skip
"""Patterns of names that are recognised, and what they are; the last is everything else."""


def factor_names(path: Path, header: Mapping[str, TensorInfo]) -> dict[str, tuple[str, str]]:
    """module → the names of its A and B in the file, in the order of the file.

    Raises:
        CheckpointError: a name that is no plain factor's, two tensors for one factor, factors of
            several adapters, or one factor without the other; each names the tensor.
    """
    if not header or len(header) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} holds {len(header)} tensors; an adapter has 2 to {MAX_TENSORS}. It is "
            "damaged, or no adapter."
        )
    stripped: dict[tuple[str, str], str] = {}
    adapters: dict[tuple[str | None, bool], str] = {}
    for name in header:
        module, factor, adapter = _split(path, name)
        if (module, factor) in stripped:
            raise CheckpointError(
                f"{path}: {stripped[module, factor]!a} and {name!a} are both {factor} of {module}. "
                "Remove one of them."
            )
        stripped[module, factor] = name
        adapters[adapter] = name
    if len(adapters) > 1:
        first, second = list(adapters.values())[:2]
        raise CheckpointError(
            f"{path}: {first!a} and {second!a} are not of one adapter: names differ in the "
            "adapter's name or in the prefix. Save each adapter into a directory of its own."
        )
    return _paired(path, stripped)


def _split(path: Path, name: str) -> tuple[str, str, tuple[str | None, bool]]:
    """(module, factor, what all names of one adapter have in common)."""
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
    nested = found is not None and "base_layer" in found["module"].split(".")
    if found is None or nested:
        what = next(what for pattern, what in UNSUPPORTED if re.search(pattern, bare))
        raise CheckpointError(f"{path}: {name!a} is {what}")
    if not MODULE.fullmatch(found["module"]):
        raise CheckpointError(
            f"{path}: {name!a} names no module: names are letters, digits, '_', '-', and dots "
            "between them. The file is damaged."
        )
    return found["module"], found["factor"], (found["adapter"], prefixed)


def _paired(path: Path, names: Mapping[tuple[str, str], str]) -> dict[str, tuple[str, str]]:
    pairs = {}
    for module, factor in names:
        other = "lora_B" if factor == "lora_A" else "lora_A"
        if (module, other) not in names:
            raise CheckpointError(
                f"{path} has {factor} of {module} but no {other}: the expert would do nothing "
                "there. The file is incomplete; take an undamaged copy."
            )
        pairs[module] = names[module, "lora_A"], names[module, "lora_B"]
    return pairs


def check_shapes(
    path: Path,
    header: Mapping[str, TensorInfo],
    pairs: Mapping[str, tuple[str, str]],
    ranks: Mapping[str, int],
    *,
    max_rank: int,
) -> None:
    """Raise CheckpointError unless A is (R, in) and B is (out, R), of floats, with R the rank that
    the configuration gives and at most `max_rank`."""
    for module, names in pairs.items():
        a, b = (header[name] for name in names)
        for name in names:
            info = header[name]
            if info.dtype not in TYPES or len(info.shape) != 2 or 0 in info.shape:
                raise CheckpointError(
                    f"{path}: {name!a} is {_shown(info)}; factors are matrices of "
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


def _shown(info: TensorInfo) -> str:
    return str(info)[:100]


def examples(names: Iterable[str]) -> str:
    """Three names and how many there are, for messages."""
    every = [ascii(name)[1:-1][:80] for name in names]
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more

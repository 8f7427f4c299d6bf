"""What servers refuse, or ignore in silence, in a LoRA directory: the rules as code.

vLLM (`PEFTHelper`, `LoRAModel`), SGLang 0.5.23 (`srt/lora`), LoRAX and Punica, as read from their
sources. A rule names the server that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molora.compose.servable import LAYER, RANKS, TOGETHER
from molora.errors import CheckpointError
from molora.io.header import TensorInfo, read_header
from molora.io.peft_adapter import CONFIG, TENSORS
from molora.io.peft_keys import examples
from molora.io.sealed import parse_json, printable, read_text

PREFIX = "base_model.model."
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Starts called by a name that vLLM loads; others take a part out of the base's weight."""
REFUSED = {
    "use_dora": "vLLM and SGLang refuse DoRA",
    "lora_bias": "vLLM refuses lora_bias, SGLang ignores it",
    "modules_to_save": "vLLM refuses modules_to_save, SGLang ignores it",
    "alora_invocation_tokens": "vLLM refuses activated LoRA",
    "layer_replication": "vLLM refuses layer_replication",
    "use_bdlora": "vLLM refuses block-diagonal LoRA",
    "use_qalora": "vLLM refuses QA-LoRA",
    "use_rslora": "SGLang ignores rsLoRA and scales with alpha / r",
    "rank_pattern": "SGLang ignores rank_pattern",
    "alpha_pattern": "SGLang ignores alpha_pattern",
    "trainable_token_indices": "SGLang refuses trained tokens",
    "kasa_config": "servers ignore KaSA",
    "arrow_config": "servers ignore Arrow's routing",
    "megatron_config": "servers read no sharded factors",
}
"""Settings that must be unset, and who minds."""
MAX_FAULTS = 100
"""Faults that are listed."""


def servable_faults(directory: Path, *, layers: int | None = None) -> list[str]:
    """Why a server would refuse the directory or compute something else; empty if none would.

    Args:
        directory: of package peft's format.
        layers: of the base, if known; else they are counted up to the last that is adapted.

    Raises:
        CheckpointError: files that are damaged.
    """
    absent = [name for name in (CONFIG, TENSORS) if not (directory / name).is_file()]
    if absent:
        return [f"there is no {name}" for name in absent]
    config = parse_json(read_text(directory / CONFIG), where=str(directory / CONFIG))
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / CONFIG} is damaged: {type(config).__name__}.")
    header = read_header(directory / TENSORS)
    faults = [*_other_files(directory), *_settings(config), *_ranks(config)]
    pairs, strange = _pairs(header)
    faults += strange
    faults += [*_tensors(header), *_shapes(config, pairs), *_targets(config, pairs)]
    faults += [*_together(pairs), *_layers(pairs, layers)]
    more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
    return [printable(fault[:1000]) for fault in faults[:MAX_FAULTS]] + more


def _other_files(directory: Path) -> Iterator[str]:
    weights = [p.name for p in directory.iterdir() if p.suffix in (".safetensors", ".bin", ".pt")]
    others = sorted(name for name in weights if name != TENSORS)
    if others:
        yield f"{examples(others)}: SGLang and S-LoRA read every file of weights, besides {TENSORS}"
    if (directory / "added_tokens.json").exists():
        yield "added_tokens.json: SGLang refuses adapters that add tokens"


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    if str(config.get("peft_type")).lower() != "lora":
        yield f"peft_type is {config.get('peft_type')!r}: SGLang asserts LORA"
    for key in ("r", "lora_alpha", "target_modules"):
        if config.get(key) is None:
            yield f"{key} is not set: vLLM requires it"
    for key, reason in REFUSED.items():
        if config.get(key):
            yield f"{key} is set: {reason}"
    if config.get("bias", "none") != "none":
        yield f"bias is {config['bias']!r}: vLLM refuses it, SGLang ignores it"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in INITS:
        yield f"init_lora_weights is {start!r}: vLLM refuses it"


def _ranks(config: Mapping[str, Any]) -> Iterator[str]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if rank is None:
        return
    if type(rank) is not int or rank not in RANKS:
        yield f"r is {rank!r}: kernels of Punica and vLLM's limits are {', '.join(map(str, RANKS))}"
    if alpha is not None and alpha != rank:
        yield f"lora_alpha is {alpha!r}, not r: Punica has one scale for all, so it must be in B"


def _pairs(
    header: Mapping[str, TensorInfo],
) -> tuple[dict[str, dict[str, TensorInfo]], list[str]]:
    """(module → factor → shape, faults of names)."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    faults = []
    for name, info in header.items():
        module, _, factor = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        named = name.startswith(PREFIX) and name.endswith(".weight") and module
        if not named or factor not in ("lora_A", "lora_B"):
            faults.append(f"{name}: vLLM reads {PREFIX}….lora_A.weight and lora_B.weight only")
            continue
        pairs.setdefault(module, {})[factor] = info
    for module, factors in pairs.items():
        lacking = {"lora_A", "lora_B"} - factors.keys()
        if lacking:
            faults.append(f"{module} has no {lacking.pop()}")
    return pairs, faults


def _tensors(header: Mapping[str, TensorInfo]) -> Iterator[str]:
    if not header:
        yield f"{TENSORS} holds nothing"
    for name, info in header.items():
        if info.dtype not in ("float32", "float16", "bfloat16"):
            yield f"{name} is {info.dtype}: servers read float32, float16, bfloat16"


def _shapes(
    config: Mapping[str, Any], pairs: Mapping[str, Mapping[str, TensorInfo]]
) -> Iterator[str]:
    rank = config.get("r")
    for module, factors in pairs.items():
        for name, axis in (("lora_A", 0), ("lora_B", 1)):
            if name in factors:
                shape = factors[name].shape
                if len(shape) != 2 or shape[axis] != rank:
                    yield (
                        f"{name} of {module} is {list(shape)}: with r {rank!r} SGLang and LoRAX "
                        f"expect a matrix with {rank!r} {('rows', 'columns')[axis]}"
                    )


def _targets(
    config: Mapping[str, Any], pairs: Mapping[str, Mapping[str, TensorInfo]]
) -> Iterator[str]:
    named = config.get("target_modules")
    if named is None:
        return
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        yield f"target_modules is {str(named)[:80]!r}: SGLang and LoRAX read a list of names"
        return
    long = [name for name in named if "." in name]
    if long:
        yield f"target_modules name {examples(long)}: SGLang compares the last part of names"
    leaves = {module.rpartition(".")[2] for module in pairs}
    for name in sorted(set(named) - leaves - set(long)):
        yield f"target_modules name {name}, which has no tensors"
    for name in sorted(leaves - set(named)):
        if not long:
            yield f"{name} has tensors, and target_modules do not name it: SGLang ignores it"


def _together(pairs: Mapping[str, Mapping[str, TensorInfo]]) -> Iterator[str]:
    parents: dict[str, set[str]] = {}
    for module in pairs:
        parent, _, leaf = module.rpartition(".")
        parents.setdefault(parent, set()).add(leaf)
    for parent, leaves in parents.items():
        for group in TOGETHER:
            lacking = [name for name in group if name not in leaves]
            if lacking and len(lacking) < len(group):
                yield f"{parent} has no {', '.join(lacking)}: SGLang fuses {', '.join(group)}"


def _layers(pairs: Mapping[str, Mapping[str, TensorInfo]], layers: int | None) -> Iterator[str]:
    kinds: dict[str, set[int]] = {}
    counts: dict[str, int] = {}  # by what stands before the layer's number
    for module in pairs:
        for number in LAYER.findall(module)[:1]:
            kind = LAYER.sub("*", module, count=1)
            stack = kind.split("*")[0]
            kinds.setdefault(kind, set()).add(int(number))
            counts[stack] = max(counts.get(stack, layers or 0), int(number) + 1)
    for kind, numbers in kinds.items():
        count = counts[kind.split("*")[0]]
        lacking = [number for number in range(count) if number not in numbers]
        if lacking:
            numbered = examples(map(str, lacking))
            yield f"{kind} is not in layers {numbered}: LoRAX drops it in all of them"

"""Factors of experts → a directory that package peft loads to the same function.

Read again, by molora or by package peft 0.21.2, every tensor has the same bytes and every scaling
the same value.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from molora.errors import CheckpointError, ConfigError
from molora.io.adapter import Adapter, AdapterModule, ExpertParameter
from molora.io.atomic import flush
from molora.io.peft_adapter import CONFIG, TENSORS
from molora.io.peft_config import parse_config, ranks_and_scalings
from molora.io.peft_keys import MODULE, TYPES, examples
from molora.io.peft_parameters import NESTED, ORDER

PREFIX = "base_model.model."
PARTS_OF_PATHS = frozenset(
    {
        *(
            "base_model",
            "model",
            "base_layer",
            "module",
            "modules",
            "transformer",
            "bert",
            "roberta",
        ),
        *("layer", "layers", "block", "blocks", "encoder", "decoder", "h", "shared", "lm_head"),
        *(
            "attn",
            "attention",
            "self_attn",
            "self_attention",
            "cross_attention",
            "q",
            "k",
            "v",
            "o",
        ),
        *(
            "mlp",
            "ffn",
            "feed_forward",
            "experts",
            "expert",
            "router",
            "gate",
            "wi",
            "wo",
            "linear",
        ),
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query", "key", "value"),
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense", "output"),
        *("c_attn", "c_proj", "c_fc", "intermediate", "classifier", "score", "embed_tokens"),
        *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
        *("weight", "bias", "default"),
    }
)
"""Names that are parts of names of tensors in common models."""


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Names of directories."""


def check_adapter_names(names: Iterable[str], modules: Iterable[str]) -> None:
    """Raises ConfigError for names of adapters that could be a part of a tensor's name: package
    peft (0.20 to 0.21.2), saving one adapter, leaves out tensors with another's name in theirs."""
    parts = {part for module in modules for part in module.split(".")}
    names = list(names)
    no_names = [name for name in names if not NAME.fullmatch(name)]
    if no_names:
        raise ConfigError(
            f"Adapters to export cannot be called {examples(no_names)}: directories are called as "
            "they are. Take letters, digits, '_' and '-', the first a letter or digit."
        )
    wrong = [name for name in names if name.isdigit() or name in PARTS_OF_PATHS or name in parts]
    if wrong:
        raise ConfigError(
            f"Adapters to export cannot be called {examples(wrong)}: package peft takes such names "
            "for parts of a module's, and loses tensors when it saves. Give them other names."
        )


def write_adapters(root: Path, adapters: Mapping[str, Adapter]) -> None:
    """One directory for each adapter, called by its name, below `root`.

    Raises:
        ConfigError: names as in `check_adapter_names`, and as in `write_adapter`.
        CheckpointError: as in `write_adapter`. What was written before stays.
    """
    every = adapters.values()
    check_adapter_names(adapters, {name for a in every for name in [*a.modules, *a.parameters]})
    for name in adapters:
        check_free(root / name)
    for name, adapter in adapters.items():
        write_adapter(
            root / name,
            adapter.modules,
            adapter.parameters,
            base=adapter.base,
            revision=adapter.revision,
            fan_in_fan_out=adapter.fan_in_fan_out,
            invocation_tokens=adapter.invocation_tokens,
        )


def write_adapter(
    directory: Path,
    modules: Mapping[str, AdapterModule],
    parameters: Mapping[str, ExpertParameter] = MappingProxyType({}),
    *,
    base: str | None = None,
    revision: str | None = None,
    fan_in_fan_out: bool = False,
    invocation_tokens: Sequence[int] | None = None,
    leaf_targets: bool = False,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; both are there or neither.

    Tensors keep their type and bytes. rsLoRA is written where alpha / √R gives all the scalings
    exactly and alpha / R does not.

    Args:
        directory: must not exist, or be empty.
        modules: by the module's name in the base.
        parameters: by the parameter's name in the base.
        base, revision, fan_in_fan_out, invocation_tokens: as in `Adapter`.
        leaf_targets: name targets by the last part of their names, as servers want it, instead of
            by the whole name. A base may have more modules of such a name; peft adapts them, too,
            with updates of zero.

    Raises:
        CheckpointError: a directory that is in use or cannot be written, or tensors of other types
            than float32, float16 and bfloat16.
        ConfigError: scalings or parts that such a directory cannot say.
    """
    check_free(directory)
    config = adapter_config(modules, parameters, leaf_targets=leaf_targets)
    config |= {
        "base_model_name_or_path": base,
        "revision": revision,
        "fan_in_fan_out": fan_in_fan_out,
        "alora_invocation_tokens": list(invocation_tokens) if invocation_tokens else None,
    }
    tensors = _checked({**_tensors(modules), **_stacked_tensors(parameters)})

    def write(partial: Path) -> None:
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})

    try:
        put_directory(directory, write)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}.") from None


def check_free(directory: Path) -> None:
    """Raise CheckpointError unless the place is new or an empty directory."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise CheckpointError(f"{directory} is no directory. Give another place.")
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} is not empty. Give another place, or remove it.")


def put_directory(directory: Path, write: Callable[[Path], object]) -> None:
    """Fill a directory beside the place under a temporary name, flush it, and rename it.

    Raises:
        OSError: from writing; nothing is left behind.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".molora.{secrets.token_hex(8)}.partial"
    try:
        partial.mkdir()
        write(partial)
        for file in partial.iterdir():
            flush(file)
        flush(partial)
        os.replace(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush(directory.parent)


def _tensors(modules: Mapping[str, AdapterModule]) -> dict[str, Tensor]:
    biased = any(module.bias is not None for module in modules.values())
    tensors: dict[str, Tensor] = {}
    for path, module in modules.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = module.lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = module.lora_B
        if biased:
            zero = module.lora_B.new_zeros(module.lora_B.shape[0])
            bias = zero if module.bias is None else module.bias
            tensors[f"{PREFIX}{path}.lora_B.bias"] = bias
        if module.magnitude is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = module.magnitude
    return tensors


def _stacked_tensors(parameters: Mapping[str, ExpertParameter]) -> dict[str, Tensor]:
    """Factors of stacked weights as `molora.io.peft_parameters` reads them: A by expert, then by
    rank, B the other way, and of two parameters of one module the earlier within the later."""
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        module, _, parameter = name.rpartition(".")
        by_module.setdefault(module, []).append(parameter)
    tensors: dict[str, Tensor] = {}
    for module, names in by_module.items():
        inside_out = [name for name in ORDER if name in names] if len(names) > 1 else names
        if len(inside_out) != len(names):
            raise ConfigError(
                f"{module} has factors of its parameters {examples(names)}; which is within which "
                f"is known for {' and '.join(ORDER)} alone. Export one of them."
            )
        for level, name in enumerate(inside_out):
            nested = f"{PREFIX}{module}{NESTED * (len(names) - 1 - level)}"
            part = parameters[f"{module}.{name}"]
            tensors[f"{nested}.lora_A.weight"] = rearrange(part.lora_A, "e r i -> (e r) i")
            tensors[f"{nested}.lora_B.weight"] = rearrange(part.lora_B, "e o r -> o (r e)")
    return tensors


def _checked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since the library refuses tensors that share memory."""
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in TYPES:
            raise CheckpointError(
                f"{name} is {tensor.dtype}; an adapter holds {', '.join(TYPES)}. Convert it."
            )
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def adapter_config(
    modules: Mapping[str, AdapterModule],
    parameters: Mapping[str, ExpertParameter] = MappingProxyType({}),
    *,
    leaf_targets: bool = False,
) -> dict[str, Any]:
    """The settings under which package peft gives each module and parameter its rank and scaling.

    Raises:
        ConfigError: no module, a name that is none, DoRA for a part of the modules, or scalings
            that no alpha gives.
    """
    parts: dict[str, AdapterModule | ExpertParameter] = {**modules, **parameters}
    wrong = [path for path in parts if not MODULE.fullmatch(path)]
    if wrong or not parts:
        raise ConfigError(f"An adapter adapts modules by name, not {examples(wrong) or 'none'}.")
    scaled_rows = {module.magnitude is not None for module in modules.values()}
    if len(scaled_rows) > 1:
        raise ConfigError(
            "DoRA is a setting of a whole adapter, and a part of the modules has no magnitude. "
            "Export them apart."
        )
    for rslora in (False, True):
        alphas = {path: _alpha(part, rslora) for path, part in parts.items()}
        known = {path: alpha for path, alpha in alphas.items() if alpha is not None}
        if len(known) == len(alphas):
            break
    else:
        raise ConfigError(
            "No alpha gives all the scalings exactly, neither alpha / R nor alpha / √R. Multiply "
            "lora_B with the scaling and give scaling 1."
        )
    ranks = {path: part.rank for path, part in parts.items()}
    paths = sorted({path.rpartition(".")[2] for path in modules} if leaf_targets else modules)
    plain = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": paths,
        "target_parameters": sorted(parameters) or None,
        "use_rslora": rslora,
        "use_dora": True in scaled_rows,
        "lora_bias": any(module.bias is not None for module in modules.values()),
    }
    for as_key in (str, _anchored):
        r, rank_pattern = _by_pattern(ranks, as_key)
        alpha, alpha_pattern = _by_pattern(known, as_key)
        config = plain | {"r": r, "lora_alpha": alpha}
        config |= {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
        if _resolves(config, parts):
            return config
    raise ConfigError("The ranks and alphas of these modules cannot be told apart by patterns.")


def _alpha(module: AdapterModule | ExpertParameter, rslora: bool) -> int | float | None:
    """An alpha whose quotient is the scaling exactly, a whole number if one is."""
    divisor = math.sqrt(module.rank) if rslora else module.rank
    product = module.scaling * divisor
    if not math.isfinite(product):
        return None
    near = (round(product), product, math.nextafter(product, math.inf))
    for alpha in (*near, math.nextafter(product, -math.inf)):
        if alpha / divisor == module.scaling:
            return alpha
    return None


def _by_pattern(
    values: Mapping[str, Any], as_key: Callable[[str], str]
) -> tuple[Any, dict[str, Any]]:
    """(the most frequent value, patterns for the others): the last part of the name where all
    modules with it share a value, else the whole name."""
    usual = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_leaf.setdefault(path.rpartition(".")[2], set()).add(value)
    patterns = {}
    for path, value in values.items():
        leaf = path.rpartition(".")[2]
        if value != usual:
            patterns[leaf if len(by_leaf[leaf]) == 1 else as_key(path)] = value
    return usual, dict(sorted(patterns.items()))


def _anchored(path: str) -> str:
    """A pattern for this name alone, where the name would match others that end in it."""
    return "^" + re.sub(r"\.", r"\\.", path)


def _resolves(
    config: Mapping[str, Any], modules: Mapping[str, AdapterModule | ExpertParameter]
) -> bool:
    parsed, _ = parse_config(config, where="the export")
    found = ranks_and_scalings(parsed, list(modules), where="the export")
    return all(found[path] == (m.rank, m.scaling) for path, m in modules.items())

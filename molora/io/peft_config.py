"""`adapter_config.json` of package peft: what of it changes the function, and what is refused.

Semantics are those of peft 0.21.2. Nothing is imported because this file names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, field_validator, model_validator

from molora.config.base import Frozen
from molora.errors import CheckpointError, ConfigError
from molora.io.peft_keys import CHOICES
from molora.io.peft_patterns import first_matches
from molora.io.sealed import parse_json, printable, read_text

MAX_CONFIG = 2**22
"""Bytes of the largest adapter_config.json that is read."""

REFUSED: dict[str, str] = {
    "layer_replication": "the base was rebuilt with repeated layers. Save the expanded base and "
    "train an adapter on it",
    "megatron_config": "the factors are those of sharded layers. Convert the adapter to plain LoRA",
    "use_qalora": "the input is pooled before lora_A. Convert the adapter to plain LoRA",
    "use_bdlora": "the factors are block-diagonal. Convert the adapter to plain LoRA",
    "arrow_config": "this adapter is a router of Arrow, its factors are not used. Leave it out",
    "kasa_config": "the base's weight was truncated. Convert the adapter to plain LoRA",
    "ensure_weight_tying": "tied embeddings are adapted together. Train an adapter without them",
    "enable_lora": "parts of a fused projection are left out. Save the adapter anew with a newer "
    "version of peft",
}
"""Settings that change the function in a way that is not read; a false value means nothing."""
REPLACING: dict[str, str] = {
    "modules_to_save": "whole modules were replaced",
    "trainable_token_indices": "rows of the embedding were replaced",
}
"""Settings that change the function beside the updates of linear layers."""
WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("lora_dropout", "megatron_core", "runtime_config", "merge_weights", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("monteclora_config", "bias"),
}
"""Settings of training and loading, and those that are checked apart."""
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
"""Ways to start that leave the base's weight as it is."""
CONVERTIBLE = re.compile(r"pissa(_niter_\d{1,4})?|olora|corda|lora_ga")
"""Ways to start that take a product of factors out of it, which can be put back."""

Alpha = Annotated[StrictInt | StrictFloat, Field(ge=-1e9, le=1e9)]
Rank = Annotated[StrictInt, Field(ge=1, le=2**31)]
Names = str | list[str] | None
Token = Annotated[StrictInt, Field(ge=0, lt=2**31)]


class AdapterConfig(Frozen):
    """What of `adapter_config.json` says how LoRA factors act."""

    r: Rank = 8
    """Rank where no pattern matches."""
    lora_alpha: Alpha = 8
    """alpha where no pattern matches."""
    use_rslora: StrictBool = False
    """scaling = alpha / sqrt(r) instead of alpha / r."""
    rank_pattern: dict[str, Rank] = Field(default={})
    """Ranks by regex, in order."""
    alpha_pattern: dict[str, Alpha] = Field(default={})
    """alphas by regex, in order."""
    lora_bias: StrictBool = False
    """lora_B has a bias, which acts with the expert."""
    use_dora: StrictBool = False
    """The rows of the adapted weight are scaled to given norms."""
    alora_invocation_tokens: list[Token] | None = Field(default=None, max_length=4096)
    """The adapter acts from the last place where these tokens follow each other."""
    fan_in_fan_out: StrictBool = False
    """The base's weight is (in, out); the factors are as ever."""
    init_lora_weights: str | None = None
    """How it started, if that took a part out of the base's weight."""
    target_parameters: list[str] | None = None
    """Parameters without a module of their own, by names or ends of names."""
    target_modules: Names = None
    """A regex, "all-linear", or names or ends of names."""
    exclude_modules: Names = None
    """The same, of modules left out."""
    layers_to_transform: StrictInt | list[StrictInt] | None = None
    """Layers adapted."""
    layers_pattern: Names = None
    """Names before a layer's number."""
    base_model_name_or_path: str | None = None
    """The base as the trainer called it."""
    revision: str | None = None
    """Its revision."""

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _may_be_null(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("lora_bias", "use_dora", mode="before")
    @classmethod
    def _null_is_false(cls, value: Any) -> Any:
        return False if value is None else value

    @model_validator(mode="after")
    def _one_variant(self) -> Self:
        settings = ("use_dora", "lora_bias", "alora_invocation_tokens", "target_parameters")
        given = [name for name in settings if getattr(self, name)]
        if len(given) > 1 and given != ["lora_bias", "alora_invocation_tokens"]:
            raise ValueError(
                f"{' and '.join(given)} are set, which package peft cannot have trained together. "
                "Take an undamaged copy"
            )
        return self


def read_config(path: Path, *, leave_out: bool = False) -> tuple[AdapterConfig, list[str]]:
    """The checked settings, and notes on those that were set aside.

    `leave_out`: also of those in REPLACING, and of trained biases of the base.

    Raises:
        CheckpointError: a file that is too large or is no JSON.
        ConfigError: a setting that cannot be, or that changes the function in a way not supported.
    """
    size = path.stat().st_size
    if size > MAX_CONFIG:
        raise CheckpointError(
            f"{path} has {size} bytes, and at most {MAX_CONFIG} are read. It is damaged, or no "
            "configuration of an adapter."
        )
    data = parse_json(read_text(path), where=str(path))
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: {type(data).__name__}, not a dict.")
    try:
        return parse_config(data, where=str(path), leave_out=leave_out)
    except RecursionError:
        raise CheckpointError(f"{path} is damaged: its values are nested too deeply.") from None


def parse_config(
    data: Mapping[str, Any], *, where: str, leave_out: bool = False
) -> tuple[AdapterConfig, list[str]]:
    """As `read_config`, of the file's content."""
    if data.get("peft_type") != "LORA":
        _refuse(where, "peft_type", data.get("peft_type"), 'only "LORA" can be an expert. Leave it')
    for key, reason in REFUSED.items():
        if data.get(key):
            _refuse(where, key, data[key], reason)
    replaced = {key: reason for key, reason in REPLACING.items() if data.get(key)}
    if data.get("bias") not in (None, "none"):
        replaced["bias"] = "the base's biases were trained"
    for key, reason in replaced.items():
        if not leave_out:
            _refuse(where, key, data[key], f"{reason}, and {CHOICES}")
    start = data.get("init_lora_weights")
    harmless = start is None or str(start).lower() in HARMLESS_INITS
    if not harmless and not (isinstance(start, str) and CONVERTIBLE.fullmatch(start.lower())):
        _refuse(where, "init_lora_weights", start, _CHANGED_BASE)
    notes = [f"{key} was left out: {reason}" for key, reason in replaced.items()]
    known = {} if harmless else {"init_lora_weights": str(start).lower()}
    for key, value in data.items():
        if key == "init_lora_weights":
            continue
        if key in AdapterConfig.model_fields:
            known[key] = value
        elif key not in WITHOUT_EFFECT and key not in REFUSED and key not in REPLACING:
            if value and (key.startswith("use_") or key.endswith("_config")):
                _refuse(where, key, value, _UNKNOWN)
            notes.append(f"unknown setting {key[:80]!a} was not read")
    try:
        return AdapterConfig.parse(known), notes
    except ConfigError as error:
        raise ConfigError(f"{where}: {printable(str(error))[:2000]}") from None


_UNKNOWN = (
    "it is unknown to this version of molora, and settings called so change what an adapter does. "
    "Save the adapter with peft 0.21.2 or older, or upgrade molora"
)
_CHANGED_BASE = (
    "such a start changes the base's weight (LoftQ: by what quantising loses, which no factors "
    "hold), so that the factors are no update of the base that other experts share. Train an "
    "adapter that starts in another way, or merge it into its own base"
)


def _refuse(where: str, key: str, value: object, reason: str) -> None:
    shown = ascii(value)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    raise ConfigError(f"{where}: {key} is {shown}: {reason}.")


def ranks_and_scalings(
    config: AdapterConfig, modules: Sequence[str], *, where: str
) -> dict[str, tuple[int, float]]:
    """module → its rank by the configuration, and alpha / r or alpha / sqrt(r).

    Raises:
        ConfigError: a pattern that cannot be matched.
    """
    ranks = _by_pattern(config.rank_pattern, modules, f"{where}: rank_pattern")
    alphas = _by_pattern(config.alpha_pattern, modules, f"{where}: alpha_pattern")
    resolved = {}
    for module in modules:
        rank, alpha = ranks.get(module, config.r), alphas.get(module, config.lora_alpha)
        resolved[module] = rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return resolved


def ambiguous_alphas(config: AdapterConfig, modules: Sequence[str], *, where: str) -> list[str]:
    """Modules whose alpha depends on the order of patterns. Package peft sorts them when it saves,
    so that what it loads, and is loaded here, may not be what was trained."""
    if len(config.alpha_pattern) < 2:
        return []
    turned = dict(reversed(config.alpha_pattern.items()))
    where = f"{where}: alpha_pattern"
    first = _by_pattern(config.alpha_pattern, modules, where)
    last = _by_pattern(turned, modules, where)
    return [module for module in modules if first.get(module) != last.get(module)]


def _by_pattern(values: Mapping[str, Any], modules: Sequence[str], where: str) -> dict[str, Any]:
    """The values of modules that have one; a module's own name counts even where, as a regex, it
    does not match itself."""
    first = first_matches(list(values), modules, whole=False, where=where)
    keys = {m: m if key is None else key for m, key in zip(modules, first, strict=True)}
    return {module: values[key] for module, key in keys.items() if key in values}

"""A run's configuration → the JSON that DeepSpeed's engine is made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molora.config.run import RunConfig
from molora.errors import ConfigError

OUTPUT = "deepspeed.json"
"""File below `output_dir` that holds what the engine got."""

_MAX_BYTES = 1_000_000
_AUTO = "auto"
# elements: 80 MB of float32 gradients at a time, since a mixture's gradients are few
_BUCKET = 20_000_000

_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
_CPU = {"device": "cpu", "pin_memory": True}
_OFFLOAD = {"zero3_offload": {"offload_param": _CPU, "offload_optimizer": _CPU}}


def deepspeed_config(config: RunConfig, *, world_size: int) -> dict[str, Any] | None:
    """The engine's configuration; None for a run without DeepSpeed.

    Derived from `train`: batch size, accumulation, clipping and the stage. There is no bf16 or fp16
    section, so the engine casts nothing: the base keeps model.dtype, the trained keep
    mixture.dtype. A file (``train.deepspeed: PATH.json``) may set everything else; its "auto"
    values are filled, and keys that molora does not know pass through.

    Args:
        config: the run.
        world_size: number of processes.

    Raises:
        ConfigError: a file that cannot be read, or that contradicts the run; every contradiction
            is named with both values.
    """
    choice = config.train.deepspeed
    if choice is None:
        return None
    derived = _derived(config, world_size)
    if choice in _STAGES:
        zero = _zero(_STAGES[choice]) | _OFFLOAD.get(choice, {})
        return {**derived, "zero_optimization": zero}
    written = _read(Path(choice))
    faults = [*_contradictions(written, derived), *_of_the_run(written, config)]
    if faults:
        listed = "\n".join(f"- {fault}" for fault in faults)
        raise ConfigError(f"train.deepspeed={choice!r} contradicts the run:\n{listed}")
    return _filled(written, derived, source=choice)


def is_partitioned(engine: Mapping[str, Any] | None) -> bool:
    """Whether the base's weights are split over the processes: ZeRO-3."""
    return engine is not None and _stage(engine) == 3


def _derived(config: RunConfig, world_size: int) -> dict[str, Any]:
    train = config.train
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "train_batch_size": train.batch_size * train.gradient_accumulation * world_size,
        "gradient_clipping": train.max_grad_norm,
        # the optimiser is the Trainer's: torch's AdamW over the mixture's groups of parameters
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 1_000_000_000,
    }


def _zero(stage: int) -> dict[str, Any]:
    zero = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        }
    return zero


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(
                f"train.deepspeed: {path} has more than {_MAX_BYTES} bytes, which is no "
                "configuration."
            )
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"train.deepspeed={str(path)!r} cannot be read: {error}. Name a JSON file for "
            f"DeepSpeed, or one of {', '.join(_STAGES)}."
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"train.deepspeed: {path} must hold an object of settings, not {type(data).__name__}."
        )
    for name in ("zero_optimization", "bf16", "fp16", "amp", "torch_autocast"):
        if not isinstance(data.get(name, {}), dict):
            raise ConfigError(f"train.deepspeed: {path}: {name} must be an object of settings.")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} stands twice")
    return dict(pairs)


# what of `train` each derived value comes from
_SOURCES = {
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "train_batch_size": "train.batch_size × train.gradient_accumulation × processes",
    "gradient_clipping": "train.max_grad_norm",
}


def _contradictions(written: Mapping[str, Any], derived: Mapping[str, Any]) -> Iterator[str]:
    for key, source in _SOURCES.items():
        value = written.get(key, _AUTO)
        if value not in (_AUTO, derived[key]):
            yield f'{key}={value!r}, but {source}={derived[key]!r}. Make them equal, or "auto".'
    for key in ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"):
        value = written.get(key, _AUTO)
        if value not in (_AUTO, derived[key]):
            yield (
                f"{key}={value!r}, but the optimiser is torch's AdamW over the mixture's groups, "
                f"which needs {derived[key]!r}. Leave it out."
            )


def _of_the_run(written: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    dtypes = f"model.dtype={config.model.dtype!r} and mixture.dtype={config.mixture.dtype!r}"
    for section in ("bf16", "fp16", "amp", "torch_autocast"):
        if written.get(section, {}).get("enabled", False) not in (False, _AUTO):
            yield (
                f"{section}.enabled={written[section]['enabled']!r}, but the run has {dtypes}, "
                f"which the engine must not cast. Leave {section} out."
            )
    train = config.train
    if "optimizer" in written:
        kind = _named(written["optimizer"])
        rate = _parameters(written["optimizer"]).get("lr", _AUTO)
        yield (
            f"optimizer is {kind} with lr={rate!r}, but the run makes its own: AdamW with "
            f"train.learning_rate={train.learning_rate!r} for the experts, and a group for the "
            "routers. Leave optimizer out."
        )
    if "scheduler" in written:
        yield (
            f"scheduler is {_named(written['scheduler'])}, but the run has "
            f"train.schedule={train.schedule!r}. Leave scheduler out."
        )
    if _stage(written) not in (0, 1, 2, 3):
        yield f"zero_optimization.stage={_stage(written)!r}, but the stages are 0, 1, 2 and 3."
    for key, name in (("tensor_parallel", "autotp_size"), ("sequence_parallel_size", None)):
        value = written.get(key, 1)
        size = value.get(name, 1) if isinstance(value, dict) else value
        if size != 1:
            shown = key if name is None else f"{key}.{name}"
            yield f"{shown}={size!r}, but a mixture is trained with data parallelism alone: use 1."


def _named(section: Any) -> str:
    return repr(section.get("type")) if isinstance(section, dict) else repr(section)


def _parameters(section: Any) -> dict[str, Any]:
    found = section.get("params") if isinstance(section, dict) else None
    return found if isinstance(found, dict) else {}


def _stage(engine: Mapping[str, Any]) -> Any:
    return engine.get("zero_optimization", {}).get("stage", 0)


def _filled(
    written: Mapping[str, Any], derived: Mapping[str, Any], *, source: str
) -> dict[str, Any]:
    """`written` with defaults for what it leaves open, free of sections that are off."""
    off = ("bf16", "fp16", "amp", "torch_autocast")
    zero = _with_defaults(written.get("zero_optimization", {}), _zero(_stage(written)))
    kept = {key: value for key, value in written.items() if key not in off}
    filled = {**_with_defaults(kept, derived), "zero_optimization": zero}
    open_values = list(_open_values(filled, ()))
    if open_values:
        raise ConfigError(
            f'train.deepspeed={source!r} leaves {", ".join(open_values)} to "auto", for which '
            "the run has no value. Give one, or leave the key out for DeepSpeed's default."
        )
    return filled


def _with_defaults(written: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {key: value for key, value in written.items() if value != _AUTO or key not in defaults}
    return {**defaults, **chosen}


def _open_values(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    if value == _AUTO:
        yield ".".join(path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _open_values(item, (*path, key))

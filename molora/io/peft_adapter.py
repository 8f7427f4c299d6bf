"""A directory that package peft saved → the factors of one frozen expert, mapped from the file.

Everything that the files say is checked before values are read; the values are checked without a
copy in memory. Nothing in the directory is written, and links in it are followed only where the
hub's cache has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from torch import Tensor

from molora.errors import CheckpointError
from molora.io.adapter import Adapter, AdapterModule, ExpertParameter
from molora.io.files import sha256
from molora.io.peft_config import AdapterConfig, ambiguous_alphas, ranks_and_scalings, read_config
from molora.io.peft_files import CONFIG, TENSORS, UNSAFE, Stored, inside, open_tensors
from molora.io.peft_keys import PartNames, check_parts, check_shapes, examples, part_names
from molora.io.peft_parameters import check_stacked_shapes, checked_parameter, split_parameters
from molora.io.peft_starts import without_start
from molora.io.peft_targets import target_differences
from molora.io.peft_values import checked_module

MAX_RANK = 512
"""Rank of a factor, unless the caller allows more."""

__all__ = ["MAX_RANK", "Adapter", "AdapterModule", "ExpertParameter", "read_adapter"]


def read_adapter(
    directory: Path,
    *,
    max_rank: int = MAX_RANK,
    allow_pickle: bool = False,
    leave_out: bool = False,
    initial: Path | None = None,
    base_weight: Callable[[str], Tensor] | None = None,
) -> Adapter:
    """The LoRA of a directory of package peft. The tensors stay in the file until used, which
    must not be changed meanwhile; writing to them leaves it as it is.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        max_rank: the largest rank to accept.
        allow_pickle: read `adapter_model.bin` where there is nothing else: of files that you trust.
        leave_out: take an adapter that also replaces parts of the base (modules_to_save, rows of
            tokens, embeddings, biases) without them, which notes name; it was trained with them.
        initial: for an adapter whose start took a part out of the base (PiSSA, OLoRA, CorDA,
            LoRA-GA): the directory with the factors as they were before training. The expert is
            then the update of the untouched base, of twice the rank.
        base_weight: for the same, the base's untouched weight (out, in) of a module, from which
            the factors of PiSSA and OLoRA follow.

    Raises:
        CheckpointError: files that are missing, links, damaged, or hold something else than LoRA
            factors.
        ConfigError: settings that cannot be, or that are not supported.
    """
    try:
        found, config = _read(directory, max_rank, allow_pickle, leave_out)
        if config.init_lora_weights is None:
            return found
        before = None if initial is None else _read(initial, max_rank, allow_pickle, leave_out)[0]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory} cannot be read: {error}.") from None
    return without_start(
        found,
        config.init_lora_weights,
        where=str(directory / CONFIG),
        initial=before,
        base_weight=base_weight,
    )


@dataclass(frozen=True)
class _Plan:
    """What the files say, checked, before values are read."""

    stored: Stored
    modules: dict[str, PartNames]
    parameters: dict[str, PartNames]
    scalings: dict[str, float]
    ranks: dict[str, int]


def _read(
    directory: Path, max_rank: int, allow_pickle: bool, leave_out: bool
) -> tuple[Adapter, AdapterConfig]:
    stored = open_tensors(directory, allow_pickle=allow_pickle)
    config, notes = read_config(inside(directory, CONFIG), leave_out=leave_out)
    where = str(directory / CONFIG)
    names, others = part_names(stored.path, stored.infos, leave_out=leave_out)
    plan = _planned(stored, config, names, where, max_rank)
    notes += others
    notes += target_differences(config, list(plan.modules), where=where)
    ambiguous = ambiguous_alphas(config, list(plan.scalings), where=where)
    if ambiguous:
        notes.append(
            f"the order in alpha_pattern decides at {examples(ambiguous)}; peft sorts it when it "
            "saves, so that the adapter may have been trained with another alpha"
        )
    if (directory / UNSAFE).exists() and (directory / TENSORS).exists():
        notes.append(f"{UNSAFE} was not read")
    adapter = Adapter(
        source=directory,
        modules={},
        base=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=config.fan_in_fan_out,
        sha256=sha256(stored.path),
        notes=tuple(notes),
        invocation_tokens=tuple(config.alora_invocation_tokens or ()) or None,
    )
    return _with_values(adapter, plan), config


def _planned(
    stored: Stored, config: AdapterConfig, names: dict[str, PartNames], where: str, max_rank: int
) -> _Plan:
    path, infos = stored.path, stored.infos
    modules, parameters = split_parameters(path, config, names)
    check_parts(path, modules, lora_bias=config.lora_bias, use_dora=config.use_dora)
    resolved = ranks_and_scalings(config, [*modules, *parameters], where=where)
    ranks = {name: rank for name, (rank, _) in resolved.items()}
    check_shapes(path, infos, modules, ranks, max_rank=max_rank)
    check_stacked_shapes(path, infos, parameters, ranks, max_rank=max_rank)
    scalings = {name: scaling for name, (_, scaling) in resolved.items()}
    return _Plan(stored, modules, parameters, scalings, ranks)


def _with_values(adapter: Adapter, plan: _Plan) -> Adapter:
    """The adapter with its tensors, whose values are checked."""
    path, tensors = plan.stored.path, plan.stored.tensors()
    modules = {
        name: checked_module(path, name, parts, tensors, plan.scalings[name])
        for name, parts in plan.modules.items()
    }
    parameters = {
        name: checked_parameter(path, name, parts, tensors, plan.scalings[name], plan.ranks[name])
        for name, parts in plan.parameters.items()
    }
    norms = {name: part.update_norm for name, part in (modules | parameters).items()}
    silent = [name for name, norm in norms.items() if norm == 0]
    notes = [f"the update is zero at {examples(silent)}"] if silent else []
    return replace(
        adapter,
        modules=MappingProxyType(modules),
        parameters=MappingProxyType(parameters),
        notes=(*adapter.notes, *notes),
    )

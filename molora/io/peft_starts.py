"""Adapters whose start took a part out of the base's weight: as updates of the untouched base.

PiSSA, OLoRA, CorDA and LoRA-GA begin with W' = W - s·B0 A0 and train W' + s·B A. With the others'
base W the same function is W + s·(B A - B0 A0), of twice the rank (PiSSA, arXiv 2404.02948; peft
0.21.2, `subtract_mutated_init`, which does not take rsLoRA with patterns; here each module has its
own scaling).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from molora.errors import CheckpointError, ConfigError
from molora.io.adapter import Adapter, AdapterModule
from molora.io.peft_keys import examples
from molora.io.peft_values import checked_norm

RECOMPUTABLE = ("pissa", "olora")


def initial_factors(start: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 (R, in) and B0 (out, R) that peft 0.21.2 begins with, in float32; their product is exact,
    each alone up to signs.

    Args:
        start: "pissa" or "olora".
        weight: (out, in), as it was before.
        rank: R.
        scaling: alpha / R, or as rsLoRA has it.

    Raises:
        ConfigError: another start, whose factors do not follow from the weight.
    """
    if start not in RECOMPUTABLE:
        raise ConfigError(
            f"the factors of {start} cannot be computed anew: they were drawn at random or follow "
            "from data. Give the directory with the initial factors."
        )
    weight_FD = weight.detach().to(torch.float32)
    if start == "olora":
        q_FR, r_RD = torch.linalg.qr(weight_FD)
        return r_RD[:rank], q_FR[:, :rank]
    if scaling <= 0:
        raise ConfigError(
            f"PiSSA divides by the scaling, which is {scaling}: no such start can be."
        )
    u_FR, s_R, v_RD = torch.linalg.svd(weight_FD, full_matrices=False)
    root_R = (s_R[:rank] / scaling).sqrt()
    return root_R[:, None] * v_RD[:rank], u_FR[:, :rank] * root_R


def without_start(
    adapter: Adapter,
    start: str,
    *,
    where: str,
    initial: Adapter | None,
    base_weight: Callable[[str], Tensor] | None,
) -> Adapter:
    """The same function as an update of the untouched base.

    Args:
        adapter: as its file has it.
        start: its `init_lora_weights`.
        where: the file that says so, for messages.
        initial: the same adapter before training.
        base_weight: the untouched weight (out, in) of a module of the base.

    Raises:
        ConfigError: nothing that the initial factors follow from.
        CheckpointError: initial factors of another adapter.
    """
    if adapter.parameters:
        raise ConfigError(f"{where}: init_lora_weights is {start!a} beside target_parameters.")
    if initial is not None:
        before = _checked_initial(adapter, initial)
    elif base_weight is not None and start in RECOMPUTABLE:
        before = {
            name: _from_weight(start, name, module, base_weight(name))
            for name, module in adapter.modules.items()
        }
    else:
        raise ConfigError(
            f"{where}: init_lora_weights is {start!a}: such a start takes a part out of the base's "
            "weight, so that the factors are no update of the base that other experts share. Give "
            "initial=, the directory with the factors before training"
            f"{', or base_weight=, from which they follow' if start in RECOMPUTABLE else ''}; or "
            "save the adapter with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=…), which writes plain LoRA."
        )
    modules = {
        name: _subtracted(adapter, name, module, *before[name])
        for name, module in adapter.modules.items()
    }
    note = f"converted from {start} to an update of the untouched base, of twice the rank"
    return replace(adapter, modules=MappingProxyType(modules), notes=(*adapter.notes, note))


def _checked_initial(adapter: Adapter, initial: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Raises CheckpointError for factors that are not of the same modules, shapes and scalings."""
    ours, theirs = adapter.modules, initial.modules
    other = sorted(
        {*ours}.symmetric_difference(theirs)
        or {name for name in ours if not _alike(ours[name], theirs[name])}
    )
    if other or initial.parameters:
        raise CheckpointError(
            f"{initial.source} has no initial factors of {adapter.source}: names, shapes or "
            f"scalings differ at {examples(other)}. Give the adapter as it was saved before its "
            "training."
        )
    return {name: (module.lora_A, module.lora_B) for name, module in theirs.items()}


def _alike(one: AdapterModule, other: AdapterModule) -> bool:
    same_shapes = one.lora_A.shape == other.lora_A.shape and one.lora_B.shape == other.lora_B.shape
    return same_shapes and one.scaling == other.scaling


def _from_weight(
    start: str, name: str, module: AdapterModule, weight: Tensor
) -> tuple[Tensor, Tensor]:
    expected = module.lora_B.shape[0], module.lora_A.shape[1]
    if tuple(weight.shape) != expected or module.rank > min(expected):
        raise CheckpointError(
            f"The weight of {name} is {list(weight.shape)}, and the adapter's factors of rank "
            f"{module.rank} are for {list(expected)}: (out, in). Give the base it was trained on."
        )
    return initial_factors(start, weight, module.rank, module.scaling)


def _subtracted(
    adapter: Adapter, name: str, module: AdapterModule, a_RD: Tensor, b_FR: Tensor
) -> AdapterModule:
    lora_A = torch.cat([module.lora_A, a_RD])
    lora_B = torch.cat([module.lora_B, -b_FR], dim=1)
    norm = checked_norm(adapter.source, name, lora_A, lora_B, module.scaling)
    return replace(module, lora_A=lora_A, lora_B=lora_B, update_norm=norm)

"""An optimiser's state in whole tensors by parameter name, whichever engine partitions it.

DeepSpeed's own checkpoints run code when they are read, and fit one number of ranks and one stage.
What is read here belongs to a parameter, and can be given to any other number of ranks or stage.

ZeRO keeps the float32 weights and moments of a group of parameters as one flat tensor, of which a
rank holds a part: `deepspeed.utils` reads and writes a parameter's share of it. On a fresh engine
the moments do not exist before the first step; so they are made here, as the optimiser would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from molora.errors import CheckpointError
from molora.train.gather import gathered

MASTER = "master"
"""The float32 weights that the optimiser steps, where the parameter itself has another dtype."""


def read_state(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """State by ``NAME/KEY``, such as ``….lora_A/exp_avg``, on the CPU, as copies.

    Collective under ZeRO: every rank calls it between two steps, and gets everything.

    Args:
        optimizer: a torch optimiser, or DeepSpeed's or accelerate's around one.
        parameters: the trained ones by name.
    """
    optimizer, inner = _unwrapped(optimizer)
    if not _is_partitioning(optimizer):
        return {
            f"{name}/{key}": torch.as_tensor(value).to("cpu", copy=True)
            for name, parameter in parameters.items()
            for key, value in inner.state.get(parameter, {}).items()
            if value is not None
        }
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state: dict[str, Tensor] = {}
    for names, members, flat in _flat_groups(optimizer, parameters):
        held = inner.state.get(flat, {})
        _link(optimizer, members, flat, inner)
        for name, parameter in zip(names, members, strict=True):
            for key, value in held.items():
                if torch.is_tensor(value) and value.shape == flat.shape:
                    whole = safe_get_full_optimizer_state(parameter, key)
                    state[f"{name}/{key}"] = _whole(whole, parameter).to("cpu", copy=True)
                else:
                    state[f"{name}/{key}"] = torch.as_tensor(value).to("cpu", copy=True)
            if parameter.dtype != torch.float32:
                whole = safe_get_full_fp32_param(parameter)
                state[f"{name}/{MASTER}"] = _whole(whole, parameter).to("cpu", copy=True)
    return state


def write_state(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Give an optimiser, fresh or not, the state that `read_state` read.

    The parameters have their values already; ZeRO's float32 copies of them are renewed.

    Args:
        optimizer: as there.
        parameters: as there.
        state: as it returns; empty if no step had been made.

    Raises:
        CheckpointError: state of other parameters.
    """
    entries = _by_parameter(parameters, state)
    optimizer, inner = _unwrapped(optimizer)
    if not _is_partitioning(optimizer):
        _write_plain(inner, parameters, entries)
        return
    for names, members, flat in _flat_groups(optimizer, parameters):
        _make_entries(inner, flat, entries[names[0]])
        _link(optimizer, members, flat, inner)
        for name, parameter in zip(names, members, strict=True):
            _set(parameter, entries[name].get(MASTER))
            for key, value in entries[name].items():
                if key != MASTER and value.dim():
                    _set(parameter, value, key)


def _write_plain(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    entries: Mapping[str, Mapping[str, Tensor]],
) -> None:
    # load_state_dict puts everything where the optimiser wants it: device, dtype, step on the CPU
    names = {id(parameter): name for name, parameter in parameters.items()}
    packed = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    packed["state"] = {
        index: {
            key: value.clone() if value.is_floating_point() or value.dim() else value.item()
            for key, value in entries[names[id(parameter)]].items()
            if key != MASTER
        }
        for index, parameter in enumerate(order)
        if entries[names[id(parameter)]]
    }
    optimizer.load_state_dict(packed)


def _make_entries(
    optimizer: torch.optim.Optimizer, flat: Tensor, example: Mapping[str, Tensor]
) -> None:
    """An optimiser's entry for a flat tensor, with the keys of one of its members."""
    held = optimizer.state[flat]
    for key, value in example.items():
        if key == MASTER:
            continue
        if not value.dim():
            # AdamW's own step is a float32 tensor on the CPU
            held[key] = value.clone() if value.is_floating_point() else value.item()
        elif key not in held:
            held[key] = torch.zeros_like(flat.data)


def _link(
    optimizer: Any, members: Sequence[nn.Parameter], flat: Tensor, inner: torch.optim.Optimizer
) -> None:
    """Let ZeRO-1 and -2 find each parameter's share of the moments.

    The library does it after the step of the first group, when the others have no moments yet.
    """
    if hasattr(optimizer, _PARTITIONS_1_2):
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        lazy_init_hp_params_optimizer_state(members, flat, inner.state)


def _set(parameter: nn.Parameter, value: Tensor | None, key: str | None = None) -> None:
    """This rank's share of the moment `key`, or of the float32 weights; these are the parameter's
    own if no value is given."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_id"):
        # the library's setter of the whole fails where the last rank's share is padded
        share = parameter.ds_tensor if value is None else _share_of(parameter, value)  # type: ignore[attr-defined]
        if key is None:
            safe_set_local_fp32_param(parameter, share.float())
        else:
            safe_set_local_optimizer_state(parameter, share.float(), key)
        return
    whole = parameter.detach() if value is None else value
    if key is None:
        safe_set_full_fp32_param(parameter, whole.float())
    else:
        safe_set_full_optimizer_state(parameter, whole.float(), key)


def _share_of(parameter: Any, value: Tensor) -> Tensor:
    """What of a whole tensor this rank holds, filled up with zeros at the end."""
    size = parameter.ds_tensor.numel()
    start = size * dist.get_rank(parameter.ds_process_group)
    share = value.flatten()[start : start + size]
    return nn.functional.pad(share, (0, size - share.numel()))


_PARTITIONS_1_2, _PARTITIONS_3 = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"


def _unwrapped(optimizer: Any) -> tuple[Any, torch.optim.Optimizer]:
    """The one that partitions, if one does, and the innermost."""
    while not _is_partitioning(optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer, getattr(optimizer, "optimizer", optimizer)


def _is_partitioning(optimizer: Any) -> bool:
    return hasattr(optimizer, _PARTITIONS_1_2) or hasattr(optimizer, _PARTITIONS_3)


def _flat_groups(
    optimizer: Any, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[list[str], Sequence[nn.Parameter], Tensor]]:
    """(names, parameters, flat float32 tensor) of every group, in an order that all ranks share."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    if hasattr(optimizer, _PARTITIONS_3):
        groups, flats = optimizer.fp16_groups, getattr(optimizer, _PARTITIONS_3)
    else:
        groups, flats = optimizer.bit16_groups, getattr(optimizer, _PARTITIONS_1_2)
    for members, flat in zip(groups, flats, strict=True):
        yield [names[id(parameter)] for parameter in members], members, flat


def _whole(value: Tensor, parameter: nn.Parameter) -> Tensor:
    return value.reshape(getattr(parameter, "ds_shape", parameter.shape))


def _by_parameter(
    parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    entries: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for place, value in state.items():
        name, _, key = place.rpartition("/")
        entries.setdefault(name, {})[key] = value
    differing = [
        name for name, found in entries.items() if name not in parameters or (state and not found)
    ]
    if differing:
        raise CheckpointError(
            "the optimiser's state is of other parameters than those trained now: "
            f"{', '.join(differing[:4])}{' …' if len(differing) > 4 else ''}. Train the same roles "
            "as before, or start a new run from the saved mixture."
        )
    return entries


def load_weights(mixture: Any, state: dict[str, Tensor]) -> None:
    """`mixture.load_state_dict` under any stage; every rank calls it with the same tensors."""
    parameters = [p for _, p in mixture.named_parameters()]
    with gathered(parameters, modifier_rank=0):
        mixture.load_state_dict(state)

"""Whole tensors of a mixture, wherever an engine keeps its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from molora.attach import Mixture

GROUP_BYTES = 2**28
"""What is gathered at once, so that a mixture larger than a GPU's rest can be saved."""


def gathered_state(mixture: Mixture, *, rank0_only: bool = True) -> dict[str, Tensor]:
    """`mixture.state_dict()` in whole tensors on the CPU, copied, under ZeRO-0 to 3, DDP or none.

    Collective: every rank calls it, between optimiser steps. The values are those that the forward
    uses; for float32 parameters, which experts and routers are by default, the optimiser's too.

    Args:
        rank0_only: other ranks than 0 get an empty dict, and keep no copy.
    """
    wanted = not rank0_only or not dist.is_initialized() or dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for group in _groups(mixture):
        with gathered(group.values()):
            if wanted:
                for name, parameter in group.items():
                    key, value = mixture.extras.stored(name, parameter.detach())
                    state[key] = value.to("cpu", copy=True)
    return state


def gathered(parameters: Any, *, modifier_rank: int | None = None) -> AbstractContextManager[None]:
    """Inside, partitioned parameters are whole; changes of `modifier_rank` reach all ranks."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    context: AbstractContextManager[None] = GatheredParameters(
        partitioned, modifier_rank=modifier_rank
    )
    return context


def _groups(mixture: Mixture) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters by name, at most GROUP_BYTES at a time unless one alone is larger."""
    group: dict[str, nn.Parameter] = {}
    total = 0
    for name, parameter in mixture.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel()) * parameter.itemsize
        if group and total + size > GROUP_BYTES:
            yield group
            group, total = {}, 0
        group[name] = parameter
        total += size
    if group:
        yield group

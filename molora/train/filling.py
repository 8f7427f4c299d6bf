"""Rows that several processes see again, because the last batches of a data set have to be full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch import Tensor

IGNORED = -100


def fills_up(accelerator: Any) -> bool:
    """Whether the batch at hand is the last of a training set, and may hold rows of its first.

    The same on all ranks.
    """
    state = accelerator.gradient_state
    sampler = getattr(state.active_dataloader, "batch_sampler", None)
    return bool(
        state.end_of_dataloader
        and state.remainder > 0
        and isinstance(sampler, BatchSamplerShard)
        and sampler.num_processes == accelerator.num_processes > 1
    )


def without_repeated(inputs: Mapping[str, Any], accelerator: Any) -> dict[str, Any]:
    """A copy of the batch at hand, without labels on rows that only fill it up.

    They are run all the same, and metrics of routing and numbers of tokens count them. The last
    batches of all ranks, one after the other, begin with the rows that are left.
    """
    found, state = dict(inputs), accelerator.gradient_state
    labels = found.get("labels")
    if not isinstance(labels, Tensor) or not state.end_of_dataloader or state.remainder <= 0:
        return found
    kept = max(0, state.remainder - accelerator.process_index * len(labels))
    for name in ("labels", "shift_labels"):
        value = found.get(name)
        if isinstance(value, Tensor) and not value.is_floating_point():
            found[name] = value.clone()
            found[name][kept:] = IGNORED
    return found

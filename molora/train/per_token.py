"""A loss per supervised token of the whole batch, also of models that do not know of such a one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molora.attach.side_inputs import ArgumentReader, share


def per_token(
    trainer: Any,
    compute_loss: Callable[..., Any],
    model: Any,
    inputs: dict[str, Any],
    num_items_in_batch: Tensor | int | None,
) -> tuple[Tensor, Any]:
    """(loss, outputs) of a micro-batch: its mean times its share of the batch's supervised tokens.

    transformers' Trainer gives the model their number, over accumulation and ranks, and takes what
    comes back for a sum over tokens divided by it. T5 and classifiers return a mean whatever they
    are given: their gradients would grow with the micro-batches of a step and the number of ranks.

    Args:
        trainer: for its arguments.
        compute_loss: that of transformers' Trainer.
        model, inputs, num_items_in_batch: as `compute_loss` takes them.
    """
    makes_it_there = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    count = ArgumentReader(trainer.model).supervised((), inputs)
    if num_items_in_batch is None or count is None or makes_it_there:
        found: tuple[Tensor, Any] = compute_loss(model, inputs, True, num_items_in_batch)
        return found
    loss, outputs = compute_loss(model, inputs, True)
    average = trainer.args.average_tokens_across_devices
    processes = trainer.accelerator.num_processes if average else 1
    # a mean over no token is not a number
    part = loss * (processes * share(num_items_in_batch, count))
    return torch.where(count > 0, part, 0.0), outputs

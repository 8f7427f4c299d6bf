"""Keep the inputs of a function and compute it again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which the inputs alone are kept for the backward.

    For what is cheap to compute and large to keep. Unlike activation checkpointing it runs no
    module, so that hooks of ZeRO-3 and of users see one forward; within that it nests.

    Args:
        function: of its inputs alone: whatever else it reads gets no gradient. It must not draw
            random numbers.
        inputs: tensors, parameters among them.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*inputs)
    return _Recomputed.apply(function, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        device = inputs[0].device.type
        ctx.function, ctx.device = function, device
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    # the second forward is of detached inputs, whose graph ends here
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        enabled, dtype = ctx.autocast
        inputs = [
            value.detach().requires_grad_(needed)
            for value, needed in zip(ctx.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad(), torch.autocast(ctx.device, dtype=dtype, enabled=enabled):
            output = ctx.function(*inputs)
        wanted = [value for value in inputs if value.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grad, allow_unused=True))
        return None, *(next(found) if needed else None for needed in needs)

"""Both ops as one autograd function around three kinds of launch.

What an op is made of, for h = A x and the output y of each slot:

| | forward | backward |
|---|---|---|
| narrow | h from x by A | ∂h and ∂gates from ∂y by B |
| widen | y from h by B, added to the base's product | ∂x from ∂h by A, added to the base's part |
| outer | | ∂A from ∂h and x; ∂B from h and ∂y |

Rows go as they come with all experts' columns while that costs less than sorting them by expert,
which reads and writes a row once for each slot; `sorting_pays` has the count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.base import Base
from molora.kernels.triton_launch import Weights, narrow, outer, require, widen
from molora.kernels.triton_rows import Rows, SharedRows, as_they_come

FLOPS_PER_BYTE = 125.0


def balance(device: torch.device) -> float:
    """FLOPs in the time of a byte: where products begin to take longer than memory.

    An A100 has 312 TFLOP/s and 2.04 TB/s, an H100 989 and 3.35, a B200 2,250 and 8, an MI300X 1,307
    and 5.3 on their data sheets: 153, 295, 281 and 247. Assumed here is that products reach 0.8 of
    that beside memory, on AMD 0.6.
    """
    if device.type != "cuda":
        return FLOPS_PER_BYTE
    if torch.version.hip is not None:
        return 150.0
    return 235.0 if torch.cuda.get_device_capability(device) >= (9, 0) else FLOPS_PER_BYTE


def sorting_pays(
    num_experts: int,
    rank: int,
    slots: int,
    *,
    summed: bool,
    flops_per_byte: float = FLOPS_PER_BYTE,
) -> bool:
    """Whether rows sorted by expert take less time than all experts' columns, by count.

    Per row and place of D, of two bytes each: as they come, narrow reads a row and widen reads and
    writes one (writes `slots` rows if not summed), or they compute 2·E·R FLOPs, whichever takes
    longer. Sorted, each slot reads a row and then again reads and writes (or writes) one.
    """
    products = 2 * num_experts * rank / flops_per_byte
    if summed:
        return 2 * slots + 4 * slots < max(2, products) + max(4, products)
    return 2 * slots + 2 * slots < max(2, products) + slots * max(2, products)


@dataclass(frozen=True)
class _Layout:
    """The slots of A and those of B, and how many of them share a row."""

    down: Rows
    up: Rows
    x_group: int
    """Slots of `down` to a row of x."""
    h_group: int
    """Slots of `up` to a row of h."""
    y_group: int
    """Slots of `up` to a row of y."""


def _layout(
    x_TD: Tensor,
    index_TK: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    plan: SharedRows | None,
    *,
    summed: bool,
) -> _Layout:
    tokens, dtype = len(x_TD), x_TD.dtype
    plain = as_they_come(tokens, dtype)
    if index_TK is None:
        return _Layout(plain, plain, x_group=1, h_group=1, y_group=1)
    slots, (experts, _, rank) = index_TK.shape[1], lora_B.shape
    if sorting_pays(experts, rank, slots, summed=summed, flops_per_byte=balance(x_TD.device)):
        rows = (plan or SharedRows(index_TK, experts)).rows(dtype)
        y_group = slots if summed else 1
        if len(lora_A) == experts:
            return _Layout(rows, rows, x_group=slots, h_group=1, y_group=y_group)
        return _Layout(plain, rows, x_group=1, h_group=slots, y_group=y_group)
    if summed:
        return _Layout(plain, plain, x_group=1, h_group=1, y_group=1)
    return _Layout(plain, as_they_come(tokens * slots, dtype), x_group=1, h_group=slots, y_group=1)


def _weights(
    up: Rows, gates_TK: Tensor | None, index_TK: Tensor | None, scaling_E: Tensor, *, summed: bool
) -> Weights:
    """What multiplies h: of every expert for rows as they come, of a slot's for sorted ones."""
    if index_TK is None:  # slot k is expert k
        return Weights(gates_TK, scaling_E)
    if up.order is not None:
        return Weights(None if gates_TK is None else gates_TK.flatten(), scaling_E)
    experts = len(scaling_E)
    if gates_TK is None:
        index_TK = index_TK.reshape(-1, 1)
        gates_TK = torch.ones_like(index_TK, dtype=torch.float32)
    zeros_TE = gates_TK.new_zeros(len(index_TK), experts)
    return Weights(zeros_TE.scatter(1, index_TK, gates_TK), scaling_E)


class Bank(torch.autograd.Function):
    """Experts on rows, summed over the slots of a row or not."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TK: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        index_TK: Tensor | None,
        scaling_E: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        transposed: bool,
        summed: bool,
        plan: SharedRows | None,
    ) -> Tensor:
        require(x_TD)
        x_TD = x_TD.contiguous()
        layout = _layout(x_TD, index_TK, lora_A, lora_B, plan, summed=summed)
        weights = _weights(layout.up, gates_TK, index_TK, scaling_E, summed=summed)
        h, _ = narrow(layout.down, x_TD, lora_A, x_group=layout.x_group)
        if weight is None:
            y = x_TD.new_empty(layout.up.count // layout.y_group, lora_B.shape[1])
        else:
            y = Base(weight, bias, transposed).product(x_TD)
        widen(
            layout.up,
            h,
            lora_B.transpose(1, 2),
            y,
            add=weight is not None,
            h_group=layout.h_group,
            out_group=layout.y_group,
            weights=weights,
        )
        up = layout.up
        ctx.save_for_backward(
            *(x_TD, gates_TK, lora_A, lora_B, index_TK, scaling_E, weight, h),
            *(up.order, up.tiles, up.starts),
        )
        ctx.layout, ctx.transposed, ctx.summed = layout, transposed, summed
        return y

    @staticmethod
    # h is saved as a constant, so a second derivative would silently lack its part
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gates_TK, lora_A, lora_B, index_TK, scaling_E, weight, h, *_ = ctx.saved_tensors
        layout = ctx.layout
        needs_x, needs_gates, needs_A, needs_B, *_ = ctx.needs_input_grad
        grad_y, factor_B = grad_y.contiguous(), lora_B.transpose(1, 2)
        weights = _weights(layout.up, gates_TK, index_TK, scaling_E, summed=ctx.summed)
        groups = {"h_group": layout.h_group, "x_group": layout.y_group, "weights": weights}
        grad_x = grad_gates = grad_A = grad_B = None
        if needs_B:
            grad_B = outer(layout.up, h, grad_y, factor_B, **groups).transpose(1, 2)
        if needs_x or needs_gates or needs_A:
            of_gates = h if needs_gates and gates_TK is not None else None
            grad_h, grad_gates = narrow(layout.up, grad_y, factor_B, h=of_gates, **groups)
            grad_gates = _of_slots(grad_gates, gates_TK, index_TK)
            if grad_h.shape != h.shape:  # slots, or experts, that share a row of h add up
                copies = grad_h.numel() // max(1, h.numel())
                grad_h = grad_h.view(len(h), copies, h.shape[1]).sum(dim=1)
            if needs_A:
                grad_A = outer(layout.down, grad_h, x_TD, lora_A, x_group=layout.x_group)
        if needs_x:
            if weight is None:
                grad_x = torch.empty_like(x_TD)
            else:
                grad_x = Base(weight, None, ctx.transposed).input_gradient(grad_y)
            add = weight is not None
            widen(layout.down, grad_h, lora_A, grad_x, add=add, out_group=layout.x_group)
        return grad_x, grad_gates, grad_A, grad_B, *[None] * 7


def _of_slots(
    grads: Tensor | None, gates_TK: Tensor | None, index_TK: Tensor | None
) -> Tensor | None:
    """The gates' gradient from that of every expert, or of every slot."""
    if grads is None or gates_TK is None:
        return None
    if index_TK is None:
        return grads.to(gates_TK.dtype)
    grad_TK = grads.gather(1, index_TK) if grads.dim() == 2 else grads.view(gates_TK.shape)
    return grad_TK.to(gates_TK.dtype)

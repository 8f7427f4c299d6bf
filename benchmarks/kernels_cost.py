"""Bytes and FLOPs of the kernels' launches and of torch's operators, and the time they need.

A launch moves each operand once for every slot that has to do with it, and a factor once: what
neighbouring programs read again is in the cache. An operator of torch reads its inputs and writes
its outputs; views are free, and picking or adding up rows touches these rows. The base's product
is nobody's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernels_compiled import Case, Launch, Target, inputs, recorded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from molora.kernels import BACKENDS, Base
from molora.kernels.lora_mix.triton_mix import lora_mix
from molora.kernels.lora_rows.triton_rows import lora_rows


@dataclass(frozen=True)
class Machine:
    """Peaks of a data sheet: bytes/s, and FLOP/s of dense bfloat16 products."""

    name: str
    bandwidth: float
    flops: float


MACHINES = (
    Machine("A100 SXM 80 GB", 2.039e12, 312e12),
    Machine("H100 SXM", 3.35e12, 989e12),
)


@dataclass(frozen=True)
class Cost:
    """Of one launch or operator."""

    name: str
    bytes: int
    flops: int

    def seconds(self, machine: Machine) -> float:
        """The longer of moving and computing at the machine's peaks."""
        return max(self.bytes / machine.bandwidth, self.flops / machine.flops)


# ---------------------------------------------------------------------------- launches


def launch_cost(launch: Launch) -> Cost:
    """By formula, from the arguments that the program is launched with."""
    a = launch.arguments
    slots, depth, is_sorted = a["slots"], a["depth"], a["SORTED"]
    experts, rank = a["E"], a["R"]
    count = slots.count
    if launch.program == "widen" and a["out"].group > 1:
        count //= slots.groups  # a turn has one slot of each row
    width = rank if is_sorted else experts * rank
    columns = a["R_PAD"] if is_sorted else experts * a["R_PAD"]
    columns = -(-columns // a["BLOCK_P"]) * a["BLOCK_P"]
    moved = 4 * experts * a["WEIGHTED"]
    if a["GATED"]:
        moved += count * (1 if is_sorted else experts) * a["gates"].at.itemsize
    if is_sorted:
        marks = slots.starts if launch.program == "outer" else slots.tiles
        share = slots.count // count
        moved += 4 * count + marks.numel() // share * 4
    if launch.program == "outer":
        factors = launch.grid[2] * experts * rank * depth * a["out"].at.itemsize
        rows = depth * a["x"].at.itemsize + width * a["h"].at.itemsize
    else:
        factors = experts * rank * depth * a["factor"].at.itemsize
        if launch.program == "narrow":
            rows = depth * a["x"].at.itemsize + width * a["out"].at.itemsize
            if a["GRAD_GATES"]:
                rows += width * a["h"].at.itemsize + 4 * a["grad_gates"].row
        else:
            rows = (1 + a["ADD"]) * depth * a["out"].at.itemsize + width * a["h"].at.itemsize
    return Cost(launch.program, moved + factors + count * rows, 2 * count * columns * depth)


# ---------------------------------------------------------------------------- torch


class Counted(TorchDispatchMode):
    """Notes what every operator costs, those of the base's weight aside."""

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.costs: list[Cost] = []
        self.weight_shape = None if weight is None else weight.shape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in FREE:
            inputs_ = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            if not any(t.shape in (self.weight_shape, _turned(self.weight_shape)) for t in inputs_):
                count = flop_registry.get(func.overloadpacket)
                flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
                self.costs.append(Cost(name, moved(name, inputs_, outputs), flops))
        return out


FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach"}
PICKED = {"index", "index_select", "gather", "embedding"}


def _turned(shape: torch.Size | None) -> torch.Size | None:
    return None if shape is None else torch.Size(reversed(shape))


def size(tensor: Tensor) -> int:
    """Bytes; of what is broadcast, those that there are."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n for n, stride in pairs if stride or not n) * tensor.itemsize


def moved(name: str, inputs_: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    indices = sum(size(t) for t in inputs_ if t.dtype in (torch.int64, torch.int32))
    if name in PICKED:
        return indices + 2 * sum(map(size, outputs))
    if name in ("index_add_", "index_add", "index_put_"):
        copied = 0 if name.endswith("_") else 2 * size(outputs[0])
        return indices + copied + 3 * size(inputs_[-1])
    read = {id(t): size(t) for t in inputs_}
    if name in ("zero_", "fill_", "new_zeros", "zeros", "zeros_like", "ones_like", "copy_"):
        read = {id(t): size(t) for t in inputs_[1:]}
    return sum(read.values()) + sum(map(size, outputs))


# ---------------------------------------------------------------------------- paths


def loop_over_experts(case: Case, p: dict[str, Any]) -> Tensor:
    """As peers do it: each expert on the rows that chose it, here equally many."""
    x, base = p["x"], p["base"]
    y = base.product(x) if base is not None else x.new_zeros(len(x), p["lora_B"].shape[1])
    rows = case.tokens * case.slots // case.experts
    weights = p["gates"].flatten().to(x.dtype)
    for expert in range(case.experts):
        index = torch.empty(rows, dtype=torch.int64, device=x.device)
        down, up = (p[name][expert].to(x.dtype) for name in ("lora_A", "lora_B"))
        delta = torch.nn.functional.linear(torch.nn.functional.linear(x[index], down), up)
        weight = weights[index] * p["scaling"][expert].to(x.dtype)
        y = y.index_add_(0, index, delta * weight[:, None])
    return y


def run(path: str, case: Case, p: dict[str, Any]) -> Tensor:
    """One of the ways to compute an op."""
    if path == "loop":
        return loop_over_experts(case, p)
    mix, rows = lora_mix, lora_rows
    if path != "triton":
        mix, rows = BACKENDS[path].lora_mix, BACKENDS[path].lora_rows
    factors = (p["lora_A"], p["lora_B"], p["scaling"])
    if case.op == "lora_mix":
        return mix(p["x"], p["gates"], p["index"], *factors, base=p["base"])
    return rows(p["x"], p["index"], *factors)


def path_costs(path: str, case: Case, target: Target) -> tuple[list[Cost], list[Cost]]:
    """Of forward and backward: launches by formula, operators as they are called."""
    with FakeTensorMode():  # on tensors without storage, which the backends take for the CPU's
        p = inputs(case, device="cpu")
        leaves = [t for t in p.values() if isinstance(t, Tensor) and t.requires_grad]
        y, forward = _counted(lambda: run(path, case, p), p["base"], target)
        upstream = torch.empty_like(y)
        _, backward = _counted(
            lambda: torch.autograd.grad(y, leaves, upstream, allow_unused=True), p["base"], target
        )
    return forward, backward


def _counted(
    function: Callable[[], Any], base: Base | None, target: Target
) -> tuple[Any, list[Cost]]:
    weight = None if base is None else base.weight
    with recorded(target) as launches, Counted(weight) as counted:
        result = function()
    return result, [launch_cost(launch) for launch in launches] + counted.costs

"""Bytes that a process sends in one optimiser step: formulas for ring collectives.

A ring of n processes that sums m bytes for all sends 2 (n - 1)/n · m from each; giving every
process its share of the sum, or collecting shares, (n - 1)/n · m (Patarasuk and Yuan, 2009).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molora.train.footprint import whole_bytes
from molora.train.shapes import Decoder, Experts, Tensors


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one process."""

    gradients: float
    """Sums over the processes."""
    trainables: float
    """Updated values, and under ZeRO-3 those that forward and backward fetch."""
    weights: float
    """The frozen base, which only ZeRO-3 sends."""

    @property
    def total(self) -> float:
        return self.gradients + self.trainables + self.weights


@dataclass(frozen=True)
class Fetches:
    """Elements that ZeRO-3 gathers for one forward and backward, as often as it gathers them."""

    frozen: int
    trained: int


def ideal(tensors: Tensors, *, processes: int) -> float:
    """The least that data parallelism sends: each trainable's gradient, summed once for all."""
    return 2 * _others(processes) * tensors.trained_bytes


def traffic(
    tensors: Tensors,
    *,
    processes: int,
    zero: Mapping[str, Any] | None,
    accumulation: int = 1,
    fetches: Fetches | None = None,
) -> Traffic:
    """What an engine sends.

    DDP and ZeRO-1 sum gradients once a step, ZeRO-2 and 3 once a micro-batch. ZeRO-1 and 2 sum them
    for all processes, although each needs a share only, and then collect what was updated: 3/2 of
    the ideal; without `use_multi_rank_bucket_allreduce` they sum for the owner of a share, as
    ZeRO-3 does, which also fetches weights for every micro-batch.

    Args:
        tensors: the model's.
        processes: n.
        zero: `zero_optimization` of DeepSpeed's configuration; None for DDP.
        accumulation: micro-batches of a step.
        fetches: ZeRO-3's, from `fetched`.
    """
    others, trained = _others(processes), tensors.trained_bytes
    stage = 0 if zero is None else zero["stage"]
    if zero is None or stage == 0:
        return Traffic(2 * others * trained, 0, 0)
    if stage < 3:
        sums = 1 if stage == 1 else accumulation
        receivers = 2 if zero.get("use_multi_rank_bucket_allreduce", True) else 1
        return Traffic(receivers * others * trained * sums, others * trained, 0)
    assert fetches is not None
    once = whole_bytes(tensors, zero)
    return Traffic(
        others * trained * accumulation,
        others * (fetches.trained * tensors.trained_itemsize * accumulation + once),
        others * fetches.frozen * tensors.frozen_itemsize * accumulation,
    )


def fetched(
    decoder: Decoder, experts: Experts, *, zero: Mapping[str, Any], checkpointing: bool = False
) -> Fetches:
    """What ZeRO-3 gathers, from the order in which the linears are used.

    A tensor is fetched for its use and let go of after it, unless it is used again within
    `stage3_max_reuse_distance` elements, or is found whole by the prefetching, which runs ahead by
    up to `stage3_max_live_parameters`. The backward pass uses all linears in reverse order, for the
    gradients of their inputs; the embeddings have none. Activation checkpointing uses each layer
    once more before, and lets go of its frozen weights once the last linear's backward is done.
    """
    reuse = zero["stage3_max_reuse_distance"]
    if zero["stage3_prefetch_bucket_size"]:
        reuse = max(reuse, 2 * zero["stage3_max_live_parameters"])
    linears = [linear for _ in range(decoder.layers) for linear in decoder.linears().values()]
    outer = decoder.vocab * decoder.hidden
    frozen = [outer, *(inputs * outputs for inputs, outputs in linears), outer]
    smallest = zero["stage3_param_persistence_threshold"]
    trained = [0, *(_divided(experts, linear, smallest) for linear in linears), 0]
    uses = list(_uses(decoder, checkpointing))
    sizes = [sum(pair) for pair in zip(frozen, trained, strict=True)]
    return Fetches(
        sum(frozen[index] for index in _gathers(uses, sizes, reuse, forced=True)),
        sum(trained[index] for index in _gathers(uses, sizes, reuse, forced=False)),
    )


@dataclass(frozen=True)
class _Use:
    """Of a linear, and those whose frozen weights are let go of after it."""

    index: int
    lets_go: range = range(0)


def _divided(experts: Experts, linear: tuple[int, int], smallest: int) -> int:
    inputs, outputs = linear
    each = experts.num_experts * experts.rank
    sizes = (each * inputs, each * outputs, experts.num_experts * inputs)
    return sum(size for size in sizes if size > smallest)


def _uses(decoder: Decoder, checkpointing: bool) -> Iterator[_Use]:
    """0 is the embeddings, then come the linears of the layers, then the head."""
    each = len(decoder.linears())
    head = 1 + each * decoder.layers
    yield from map(_Use, (*range(head + 1), head))
    for layer in reversed(range(decoder.layers)):
        linears = range(1 + each * layer, 1 + each * (layer + 1))
        if checkpointing:
            yield from map(_Use, linears)
        last, *others = reversed(linears)
        yield _Use(last, linears if checkpointing else range(0))
        yield from map(_Use, others)


def _gathers(
    uses: Sequence[_Use], sizes: Sequence[int], reuse: int, *, forced: bool
) -> Iterator[int]:
    """The uses for which a tensor has to be gathered."""
    there: set[int] = set()
    for position, use in enumerate(uses):
        if use.index not in there:
            yield use.index
            there.add(use.index)
        if not _again(uses, position, sizes, reuse):
            there.discard(use.index)
        if forced:
            there.difference_update(use.lets_go)


def _again(uses: Sequence[_Use], position: int, sizes: Sequence[int], reuse: int) -> bool:
    """Whether what is used at `position` is used again before `reuse` elements have passed."""
    passed = 0
    for later in range(position + 1, len(uses)):
        if passed >= reuse:
            return False
        if uses[later].index == uses[position].index:
            return True
        passed += sizes[uses[later].index]
    return False


def _others(processes: int) -> float:
    return (processes - 1) / processes

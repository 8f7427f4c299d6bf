"""Bytes that a process holds for weights, trainables, gradients and optimiser states: formulas.

Source: the stages of ZeRO (Rajbhandari et al., 1910.02054). What DeepSpeed keeps beyond them was
read from its code (0.19), and all is held to measurement by tests/benchmarks/test_scaling.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from molora.train.shapes import Tensors


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process between the backward pass and the update, activations not counted."""

    weights: int
    """The frozen base, or a share of it."""
    trainables: int
    """Experts and routers, and the copy of a share that DeepSpeed's optimiser steps on."""
    gradients: int
    moments: int
    """AdamW's two."""
    buffers: int
    """Space for gradients on their way to other processes, kept between steps."""
    transient: int
    """At most beside the above: gradients that are not yet divided, the share of gradients that the
    update copies into one tensor, and weights that are gathered. AdamW is taken to be fused."""
    host: int = 0
    """Of CPU memory, with offload."""

    @property
    def held(self) -> int:
        """What is in the device's memory before the update."""
        return self.peak - self.transient

    @property
    def peak(self) -> int:
        """A bound of device memory without activations: not all of it is there at once."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


def footprint(tensors: Tensors, *, processes: int, zero: Mapping[str, Any] | None) -> Footprint:
    """What one of n processes holds, F being bytes of frozen weights and G of trainables.

    ==========  =======  ==========  =========  =======  ===========
    engine      weights  trainables  gradients  moments  buffers
    ==========  =======  ==========  =========  =======  ===========
    DDP         F        G           G          2 G      G, if n > 1
    ZeRO-1, 2   F        G + G/n     G/n        2 G/n
    ZeRO-3      F/n      2 G/n       G/n        2 G/n    one bucket
    ==========  =======  ==========  =========  =======  ===========

    A bucket has `reduce_bucket_size` elements whatever G is. Under ZeRO-3 small tensors (see
    `stage3_param_persistence_threshold`) are there whole as well, and with offload all else but the
    bucket is the host's, where gradients are twice. Padding of shares to equal lengths is left out.

    Args:
        tensors: the model's; those that are trained are float32.
        processes: how many train together.
        zero: `zero_optimization` of DeepSpeed's configuration; None for DDP or one process alone.
    """
    frozen, trained = tensors.frozen_bytes, tensors.trained_bytes
    stage = 0 if zero is None else zero["stage"]
    if zero is None or stage == 0:
        buckets = trained if processes > 1 else 0
        return Footprint(frozen, trained, trained, 2 * trained, buckets, transient=0)
    share = trained // processes
    # the bucket, and the copy of it that is summed
    bucket = zero["reduce_bucket_size"] * tensors.trained_itemsize
    copy = min(bucket, trained)
    if stage < 3:
        # ZeRO-1 divides gradients when all are there
        backward = bucket + (trained if stage == 1 else copy)
        return Footprint(
            *(frozen, trained + share, share, 2 * share, 0), transient=max(backward, share)
        )
    whole = whole_bytes(tensors, zero)
    # what is gathered at once, which comes as shares and is then put together
    arriving = _divided_bytes(tensors, zero, zero["stage3_prefetch_bucket_size"])
    offloaded = bool(zero.get("offload_param"))
    divided = frozen // processes
    return Footprint(
        weights=whole + (0 if offloaded else divided),
        trainables=0 if offloaded else 2 * share,
        gradients=0 if offloaded else share,
        moments=0 if offloaded else 2 * share,
        buffers=bucket,
        transient=max(gathered_bytes(tensors, zero) + max(copy, arriving), share),
        host=divided + 6 * share if offloaded else 0,
    )


def whole_bytes(tensors: Tensors, zero: Mapping[str, Any]) -> int:
    """Of tensors that ZeRO-3 does not divide, because fetching them would take longer than reading
    them; their shares are kept as well."""
    most = zero["stage3_param_persistence_threshold"]
    frozen = sum(size for size in tensors.frozen if size <= most) * tensors.frozen_itemsize
    return frozen + sum(size for size in tensors.trained if size <= most) * tensors.trained_itemsize


def gathered_bytes(tensors: Tensors, zero: Mapping[str, Any]) -> int:
    """Most bytes of divided tensors that ZeRO-3 holds gathered at a time.

    Prefetching runs ahead until `stage3_max_live_parameters` elements are there. At the turn from
    forward to backward, what is used again within `stage3_max_reuse_distance` elements is kept:
    half of them, as each is counted on the way there and on the way back.
    """
    ahead = zero["stage3_max_live_parameters"] if zero["stage3_prefetch_bucket_size"] else 0
    return _divided_bytes(tensors, zero, max(ahead, zero["stage3_max_reuse_distance"] // 2))


def _divided_bytes(tensors: Tensors, zero: Mapping[str, Any], elements: int) -> int:
    """Of divided tensors with so many elements, and the largest that comes on top."""
    smallest = zero["stage3_param_persistence_threshold"]
    frozen = [size for size in tensors.frozen if size > smallest]
    trained = [size for size in tensors.trained if size > smallest]
    there = sum(frozen) + sum(trained)
    if not there:
        return 0
    total = sum(frozen) * tensors.frozen_itemsize + sum(trained) * tensors.trained_itemsize
    return round(total * min(1.0, (elements + max(frozen + trained)) / there))

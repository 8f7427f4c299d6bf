"""What each backend computes for a shape: its products, and the bytes that it moves beside them.

Counted from the code of `kernels/*/`, without the base's product, which is the same for all. What
is not counted, calls and small tensors, is in the figures of a calibration (`kernels.cost`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import comb
from typing import Literal

from molora.kernels.plan import by_set_is_cheaper

PARAMETER_BYTES = 4
"""Factors are usually kept in float32 and cast where they are used."""
SORT_BYTES = 200
"""Of one row while rows are sorted: passes over int64 keys and positions."""


@dataclass(frozen=True)
class Shape:
    """The sizes that decide what an op costs.

    Attributes:
        rows: T.
        in_features: D.
        out_features: F.
        num_experts: E.
        rank: R.
        slots: K; all experts where rows are not routed.
        shared_A: whether one down-projection serves all experts.
    """

    rows: int
    in_features: int
    out_features: int
    num_experts: int
    rank: int
    slots: int
    shared_A: bool = False


@dataclass(frozen=True)
class Product:
    """`groups` matrix products of (m, k) by (k, n), one after the other."""

    m: float
    n: float
    k: float
    groups: int = 1
    kind: Literal["plain", "grouped"] = "plain"

    @property
    def flops(self) -> float:
        return 2 * self.m * self.n * self.k * self.groups

    @property
    def results(self) -> float:
        """Numbers that it writes."""
        return self.m * self.n * self.groups

    @property
    def thin(self) -> float:
        """The smallest dimension, on which the rate of a product depends most."""
        return max(1.0, min(self.m, self.n, self.k))


@dataclass(frozen=True)
class Work:
    """Matrix products, and bytes read and written by everything else.

    `largest` is the most bytes of one tensor among these: what fits no cache moves more slowly.
    """

    products: tuple[Product, ...]
    bytes: float
    itemsize: int = PARAMETER_BYTES
    largest: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.bytes + other.bytes)


def work(op: str, backend: str, shape: Shape, itemsize: int, *, training: bool) -> Work:
    """Of a call, with its backward if `training`; x has `itemsize` bytes a value.

    Raises:
        KeyError: no such op or backend.
    """
    forward, backward = _WORK[op, backend]
    counted = forward(shape, itemsize)
    if training:
        counted += backward(shape, itemsize)
    largest = _largest(op, backend, shape) * itemsize
    return replace(counted, itemsize=itemsize, largest=largest)


def _largest(op: str, backend: str, s: Shape) -> int:
    """Values of the largest tensor beside the products' own."""
    width, results = max(s.in_features, s.out_features), s.rows * s.slots * s.out_features
    if backend == "gather":
        return s.rows * s.slots * s.rank * width
    if op == "lora_mix":
        return (_groups(s).sorted_rows if backend == "grouped" else s.rows) * width
    if backend == "reference":
        return s.rows * s.num_experts * s.out_features
    if backend == "grouped":
        return s.rows * s.slots * width
    return max(results, s.rows * s.slots * s.num_experts * s.rank)


def _sizes(s: Shape) -> tuple[int, int, int]:
    """(P, width of A, values of both factors)."""
    stacked = s.num_experts * s.rank
    width_A = s.rank if s.shared_A else stacked
    return stacked, width_A, width_A * s.in_features + stacked * s.out_features


def _cast(s: Shape, itemsize: int) -> float:
    """Bytes of casting both factors to the dtype of x."""
    return 0 if itemsize == PARAMETER_BYTES else _sizes(s)[2] * (PARAMETER_BYTES + itemsize)


# ------------------------------------------------------------------------------------- lora_mix


def _dense_mix(s: Shape, b: int) -> Work:
    P, width_A, _ = _sizes(s)
    products = Product(s.rows, width_A, s.in_features), Product(s.rows, s.out_features, P)
    copied_B = 2 * P * s.out_features * b
    return Work(products, 2 * s.rows * P * b + copied_B + _cast(s, b))


def _dense_mix_backward(s: Shape, b: int) -> Work:
    P, width_A, values = _sizes(s)
    products = (
        Product(P, s.out_features, s.rows),
        Product(s.rows, P, s.out_features),
        Product(width_A, s.in_features, s.rows),
        Product(s.rows, s.in_features, width_A),
    )
    gradients = values * (PARAMETER_BYTES + b)
    gates = 6 * s.rows * P * b
    copied_B = 4 * P * s.out_features * b
    return Work(products, gates + copied_B + gradients + _cast(s, b))


def _reference_mix(s: Shape, b: int) -> Work:
    P, _, _ = _sizes(s)
    products = Product(s.rows, P, s.in_features), Product(s.rows, s.out_features, P)
    copied = 2 * P * s.out_features * b + 3 * s.rows * s.out_features * b
    return Work(products, 6 * s.rows * P * b + copied + _cast(s, b))


def _reference_mix_backward(s: Shape, b: int) -> Work:
    dense = _dense_mix_backward(s, b)
    P, _, _ = _sizes(s)
    return Work(dense.products, dense.bytes + 8 * s.rows * P * b)


@dataclass(frozen=True)
class _Groups:
    """How `grouped` sorts the rows: N sorted rows in G groups, products `width` wide."""

    sorted_rows: int
    groups: int
    width: int
    copied: int
    """Values of factors that are copied for groups of several experts."""


def _groups(s: Shape) -> _Groups:
    values = s.rank * (s.in_features + s.out_features)
    if s.slots == s.num_experts:
        return _Groups(s.rows, 1, s.num_experts * s.rank, s.num_experts * values)
    if by_set_is_cheaper(s.rows, s.num_experts, s.slots):
        groups = comb(s.num_experts, s.slots)
        return _Groups(s.rows, groups, s.slots * s.rank, groups * s.slots * values)
    return _Groups(s.rows * s.slots, s.num_experts, s.rank, 0)


def _grouped(g: _Groups, m: float, n: float, k: float) -> Product:
    return Product(m, n, k, g.groups, "grouped")


def _grouped_mix(s: Shape, b: int) -> Work:
    g = _groups(s)
    rows, per_group = g.sorted_rows, g.sorted_rows / g.groups
    products = (
        _grouped(g, per_group, g.width, s.in_features),
        _grouped(g, per_group, s.out_features, g.width),
    )
    sorted_in = 2 * rows * s.in_features * b
    added = 4 * rows * s.out_features * b
    rest = rows * (SORT_BYTES + 3 * g.width * b) + 2 * g.copied * b + _cast(s, b)
    return Work(products, sorted_in + added + rest)


def _grouped_mix_backward(s: Shape, b: int) -> Work:
    g = _groups(s)
    rows, per_group = g.sorted_rows, g.sorted_rows / g.groups
    products = (
        _grouped(g, g.width, s.out_features, per_group),
        _grouped(g, per_group, g.width, s.out_features),
        _grouped(g, g.width, s.in_features, per_group),
        _grouped(g, per_group, s.in_features, g.width),
    )
    sorted_in = 2 * rows * (s.in_features + s.out_features) * b
    added = 4 * rows * s.in_features * b
    gradients = _sizes(s)[2] * (PARAMETER_BYTES + b) + g.copied * (3 * PARAMETER_BYTES + b)
    rest = 8 * rows * g.width * b + 2 * g.copied * b + _cast(s, b)
    return Work(products, sorted_in + added + gradients + rest)


def _gather_mix(s: Shape, b: int) -> Work:
    chosen = s.rows * s.slots * s.rank
    copied = chosen * (s.in_features + s.out_features) * (PARAMETER_BYTES + 2 * b)
    return Work((), copied + s.rows * (s.in_features + s.out_features) * b)


def _gather_backward(s: Shape, b: int) -> Work:
    # the gradients of the copies are as large as these, and are added up by expert
    copied = _gather_mix(s, b).bytes
    return Work((), 3 * copied + _sizes(s)[2] * PARAMETER_BYTES)


# ------------------------------------------------------------------------------------ lora_rows


def _dense_rows(s: Shape, b: int) -> Work:
    P, width_A, _ = _sizes(s)
    slots = s.rows * s.slots
    products = Product(s.rows, width_A, s.in_features), Product(slots, s.out_features, P)
    return Work(products, 4 * slots * P * b + 2 * P * s.out_features * b + _cast(s, b))


def _dense_rows_backward(s: Shape, b: int) -> Work:
    P, width_A, values = _sizes(s)
    slots = s.rows * s.slots
    products = (
        Product(P, s.out_features, slots),
        Product(slots, P, s.out_features),
        Product(width_A, s.in_features, s.rows),
        Product(s.rows, s.in_features, width_A),
    )
    copied_B = 4 * P * s.out_features * b
    return Work(products, 6 * slots * P * b + copied_B + values * (PARAMETER_BYTES + b))


def _reference_rows(s: Shape, b: int) -> Work:
    P, _, _ = _sizes(s)
    products = (
        Product(s.rows, P, s.in_features),
        Product(s.rows, s.out_features, s.rank, s.num_experts),
    )
    every = s.rows * s.num_experts * s.out_features * b
    return Work(products, 3 * every + 2 * s.rows * s.slots * s.out_features * b + _cast(s, b))


def _reference_rows_backward(s: Shape, b: int) -> Work:
    forward = _reference_rows(s, b)
    return Work(forward.products * 2, 2 * forward.bytes)


def _by_slot(s: Shape) -> _Groups:
    return _Groups(s.rows * s.slots, s.num_experts, s.rank, 0)


def _grouped_rows(s: Shape, b: int) -> Work:
    g = _by_slot(s)
    per_group = g.sorted_rows / g.groups
    products = (
        _grouped(g, per_group, s.rank, s.in_features),
        _grouped(g, per_group, s.out_features, s.rank),
    )
    sorted_in = 2 * g.sorted_rows * s.in_features * b
    unsorted = 2 * g.sorted_rows * s.out_features * b
    return Work(products, sorted_in + unsorted + g.sorted_rows * SORT_BYTES + _cast(s, b))


def _grouped_rows_backward(s: Shape, b: int) -> Work:
    g = _by_slot(s)
    per_group = g.sorted_rows / g.groups
    products = (
        _grouped(g, s.rank, s.out_features, per_group),
        _grouped(g, per_group, s.rank, s.out_features),
        _grouped(g, s.rank, s.in_features, per_group),
        _grouped(g, per_group, s.in_features, s.rank),
    )
    sorted_in = 2 * g.sorted_rows * (s.in_features + s.out_features) * b
    added = 4 * g.sorted_rows * s.in_features * b
    return Work(products, sorted_in + added + _sizes(s)[2] * (PARAMETER_BYTES + b) + _cast(s, b))


def _gather_rows(s: Shape, b: int) -> Work:
    return _gather_mix(s, b) + Work((), s.rows * s.slots * s.out_features * b)


# ----------------------------------------------------------------------------------- triton, both


def _triton(s: Shape, b: int, *, summed: bool) -> tuple[tuple[Product, Product], float]:
    """The two products of a pass and the bytes beside them; gates cost no pass of their own.

    Rows go through all experts, or sorted through their own, as `sorting_pays` says. The smallest
    side of a tensor core's product is 16.
    """
    from molora.kernels.triton_bank import sorting_pays

    slots, again = s.rows * s.slots, 0
    if s.slots < s.num_experts and sorting_pays(s.num_experts, s.rank, s.slots, summed=summed):
        wide, rows, results = max(16, s.rank), slots, slots
        if summed:  # each slot adds to what the ones before it have written
            again = slots * s.out_features * b
    else:
        wide, rows = max(16, s.num_experts * s.rank), s.rows
        results = s.rows if summed else slots
    products = Product(rows, wide, s.in_features), Product(results, s.out_features, wide)
    return products, again + 2 * rows * wide * b + PARAMETER_BYTES * _sizes(s)[2]


def _triton_forward(s: Shape, b: int, *, summed: bool) -> Work:
    return Work(*_triton(s, b, summed=summed))


def _triton_backward(s: Shape, b: int, *, summed: bool) -> Work:
    products, moved = _triton(s, b, summed=summed)
    return Work(products * 2, 2 * moved + PARAMETER_BYTES * _sizes(s)[2])


_Count = Callable[[Shape, int], Work]
_WORK: dict[tuple[str, str], tuple[_Count, _Count]] = {
    ("lora_mix", "reference"): (_reference_mix, _reference_mix_backward),
    ("lora_mix", "dense"): (_dense_mix, _dense_mix_backward),
    ("lora_mix", "grouped"): (_grouped_mix, _grouped_mix_backward),
    ("lora_mix", "gather"): (_gather_mix, _gather_backward),
    ("lora_mix", "triton"): (
        partial(_triton_forward, summed=True),
        partial(_triton_backward, summed=True),
    ),
    ("lora_rows", "reference"): (_reference_rows, _reference_rows_backward),
    ("lora_rows", "dense"): (_dense_rows, _dense_rows_backward),
    ("lora_rows", "grouped"): (_grouped_rows, _grouped_rows_backward),
    ("lora_rows", "gather"): (_gather_rows, _gather_backward),
    ("lora_rows", "triton"): (
        partial(_triton_forward, summed=False),
        partial(_triton_backward, summed=False),
    ),
}
BACKENDS = tuple(dict.fromkeys(backend for _, backend in _WORK))
OPS = tuple(dict.fromkeys(op for op, _ in _WORK))

"""Which backend "auto" stands for: the one that is estimated to take the least time.

A call's time is scale · (Σ products + bytes / bandwidth) + spill · (what large tensors add) +
fixed. What is multiplied and moved is counted from shapes (`kernels.work`); how fast that goes is
in a calibration. Nothing here reads a tensor, so nothing waits for a device and the routing does
not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import TYPE_CHECKING

import torch

from molora.errors import BackendError
from molora.kernels.calibration import (
    Calibration,
    DeviceFigures,
    DtypeFigures,
    load_calibration,
    shipped,
)
from molora.kernels.work import OPS, Product, Shape, Work, work

if TYPE_CHECKING:
    from molora.kernels.backend import Backend

# in this order where estimates are equal; the reference is what the others are held against
CANDIDATES = ("dense", "grouped", "gather", "triton")
CACHED_BYTES = 4 * 2**20
"""Of the tensors that rates and the nearer bandwidth of a calibration were measured with."""
TRAINING_ROWS = 4096
"""For how many rows "auto" chooses in training, whatever a batch has."""
FALLBACK = "dense"
"""Where there are no figures, and under torch.compile: its shapes never depend on the routing."""


@dataclass(frozen=True)
class Estimate:
    """What a call of a backend is estimated to take; None with the reason if "auto" never takes it.

    Attributes:
        seconds: of forward, or of forward and backward.
        gflop: operations of its products, in 10⁹.
        mib: bytes that it moves beside its products, in 2²⁰.
    """

    backend: str
    seconds: float | None
    reason: str
    gflop: float
    mib: float


def choose(
    op: str,
    *,
    rows: int,
    in_features: int,
    out_features: int,
    num_experts: int,
    rank: int,
    slots: int | None,
    dtype: torch.dtype,
    device_type: str,
    shared_A: bool = False,
    training: bool = True,
    calibration: Calibration | None = None,
    names: tuple[str, ...] = CANDIDATES,
) -> str:
    """The backend that takes the least time for these shapes.

    Args:
        op: "lora_mix" or "lora_rows".
        rows: T, rows of x.
        slots: K, experts of a row; None: all act.
        dtype: of x, in which products run.
        device_type: "cpu", "cuda", …
        training: whether a backward follows.
        calibration: the figures; None: the shipped ones.
        names: the backends to choose from.

    Raises:
        BackendError: no such op.
    """
    shape = (rows, in_features, out_features, num_experts, rank, slots or num_experts, shared_A)
    figures = shipped() if calibration is None else calibration
    return _chosen(op, shape, dtype, device_type, training, figures, names)


def explain(
    op: str,
    shape: Shape,
    *,
    dtype: torch.dtype,
    device_type: str,
    training: bool = True,
    calibration: Calibration | None = None,
    names: tuple[str, ...] = ("reference", *CANDIDATES),
) -> list[Estimate]:
    """An estimate of each backend.

    Raises:
        BackendError: no such op.
    """
    if op not in OPS:
        raise BackendError(f"op={op!r} does not exist. Known: {', '.join(OPS)}.")
    found = (calibration or shipped()).figures(device_type, _name(dtype))
    mode = "training" if training else "forward"
    estimates = []
    for name in names:
        counted = work(op, name, shape, dtype.itemsize, training=training)
        reason = refusal(name, dtype, device_type) or waste(name, shape, training=training)
        seconds = None
        if found is not None:
            line = found[1].lines.get((op, name, mode))
            if line is not None:
                near, added = counted_seconds(counted, *found)
                seconds = line.scale * near + line.spill * added + line.fixed
        if seconds is None and not reason:
            reason = f"no figures for {device_type}"
        gflop = sum(product.flops for product in counted.products) / 1e9
        estimates.append(Estimate(name, seconds, reason, gflop, counted.bytes / 2**20))
    return estimates


def refusal(name: str, dtype: torch.dtype, device_type: str) -> str:
    """Why "auto" never takes a backend there; empty if it may."""
    if name == "reference":
        return "the specification: it is not made for speed"
    if name == "triton" and device_type != "cuda":
        return f"needs a GPU of NVIDIA or AMD, not {device_type}"
    if name in ("grouped", "triton") and dtype not in _LOW:
        return f"has no product in {_name(dtype)}"
    return ""


def waste(name: str, shape: Shape, *, training: bool) -> str:
    """Why "auto" does not take a backend for a shape, however fast it is; empty if it may."""
    if name != "gather":
        return ""
    if shape.slots == shape.num_experts:
        return "would copy the factors of all experts for every row"
    return "its copies of factors would be kept for the backward" if training else ""


def crossovers(
    op: str,
    shape: Shape,
    *,
    dtype: torch.dtype,
    device_type: str,
    training: bool,
    calibration: Calibration,
    most: int = 2**16,
) -> list[tuple[int, str]]:
    """(first number of rows, backend) of each choice from 1 row to `most`, to within 1/16."""
    rows, found = 1, list[tuple[int, str]]()
    while rows <= most:
        sizes = (rows, shape.in_features, shape.out_features, shape.num_experts, shape.rank)
        key = (*sizes, shape.slots, shape.shared_A)
        name = _chosen(op, key, dtype, device_type, training, calibration, CANDIDATES)
        if not found or found[-1][1] != name:
            found.append((rows, name))
        rows = max(rows + 1, rows + rows // 16)
    return found


class Chooser:
    """ "auto": chooses from a table by the shape of each call, `dense` under torch.compile.

    Args:
        table: name → backend; names that the cost model does not know are never chosen.
        calibration: the figures; None: the user's, else the shipped ones, read here and once.

    Raises:
        ConfigError: the user's file is damaged.
    """

    name = "auto"

    def __init__(
        self, table: Mapping[str, Backend], calibration: Calibration | None = None
    ) -> None:
        self.table = dict(table)
        self.calibration = load_calibration() if calibration is None else calibration
        self.names = tuple(name for name in CANDIDATES if name in self.table)

    def choose(
        self,
        op: str,
        *,
        rows: int,
        in_features: int,
        out_features: int,
        num_experts: int,
        rank: int,
        slots: int | None,
        dtype: torch.dtype,
        device_type: str,
        shared_A: bool = False,
        training: bool = True,
    ) -> Backend:
        """As the function `choose`, from the table; in training for `TRAINING_ROWS`.

        Backends have their gradients ready in orders of their own, and ZeRO adds up those of
        several processes as they come: processes with unlike rows must not choose unlike backends.
        """
        if torch.compiler.is_compiling():
            return self.table[FALLBACK]
        shape = (
            TRAINING_ROWS if training else rows,
            in_features,
            out_features,
            num_experts,
            rank,
            slots or num_experts,
            shared_A,
        )
        key = (op, shape, dtype, device_type, training, self.calibration, self.names)
        return self.table[_chosen(*key)]


_Sizes = tuple[int, int, int, int, int, int, bool]
_LOW = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=2**14)
def _chosen(
    op: str,
    sizes: _Sizes,
    dtype: torch.dtype,
    device_type: str,
    training: bool,
    calibration: Calibration,
    names: tuple[str, ...],
) -> str:
    estimates = explain(
        op,
        Shape(*sizes),
        dtype=dtype,
        device_type=device_type,
        training=training,
        calibration=calibration,
        names=names,
    )
    fit = [(e.seconds, e.backend) for e in estimates if e.seconds is not None and not e.reason]
    return min(fit, key=lambda pair: pair[0])[1] if fit else FALLBACK


def counted_seconds(
    counted: Work, device: DeviceFigures, figures: DtypeFigures
) -> tuple[float, float]:
    """Seconds of products and bytes in cache, and what tensors that fit none add to them."""
    near = counted.bytes / _between(device.bandwidth, CACHED_BYTES)
    added = _added(counted.bytes, counted.largest, device)
    for product in counted.products:
        near += product.flops / rate(product, figures)
        if product.kind == "grouped":
            near += device.group * product.groups
        size = product.results * counted.itemsize
        added += _added(size, size, device)
    return near, added


def _added(moved: float, size: float, device: DeviceFigures) -> float:
    """Seconds by which moving bytes takes longer in a tensor of this size than in cache."""
    usual, own = (_between(device.bandwidth, s) for s in (CACHED_BYTES, size))
    return max(0.0, moved / own - moved / usual)


def rate(product: Product, figures: DtypeFigures) -> float:
    """FLOP/s by the smallest dimension; padding of smaller ones costs what a whole one would."""
    points = figures.rates[product.kind]
    return _between(points, product.thin) * min(1.0, product.thin / points[0][0])


def _between(points: tuple[tuple[float, float], ...], size: float) -> float:
    """The rate at a size, along straight lines of log₂ of it; the ends' outside of them."""
    below = points[0]
    for above in points:
        if size <= above[0]:
            break
        below = above
    if above[0] <= below[0] or size >= above[0]:
        return above[1]
    share = max(0.0, log2(max(size, 1) / below[0]) / log2(above[0] / below[0]))
    return below[1] + share * (above[1] - below[1])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

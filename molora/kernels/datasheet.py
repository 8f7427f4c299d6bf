"""Figures of a GPU that nobody has measured yet, from what its maker says of it.

They stand in the shipped calibration until `molora bench --calibrate --device cuda` has run. The
rate of a thin product is that at which memory brings its wide operand, at most the peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from molora.kernels.calibration import DeviceFigures, DtypeFigures, Line

THIN = (1, 4, 8, 16, 32, 64, 128, 256, 512)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Operators of a call that start a kernel, counted in bfloat16: forward, forward and backward.
LAUNCHES: dict[tuple[str, str], tuple[int, int]] = {
    ("lora_mix", "dense"): (10, 31),
    ("lora_mix", "grouped"): (17, 46),
    ("lora_mix", "gather"): (11, 29),
    ("lora_mix", "triton"): (6, 16),
    ("lora_rows", "dense"): (11, 31),
    ("lora_rows", "grouped"): (16, 43),
    ("lora_rows", "gather"): (9, 22),
    ("lora_rows", "triton"): (8, 18),
}


@dataclass(frozen=True)
class DataSheet:
    """`peaks` are FLOP/s by dtype, `bandwidth` bytes/s, `launch` seconds that a kernel takes to
    start; the last is an assumption, no data sheet has it."""

    name: str
    peaks: Mapping[str, float]
    bandwidth: float
    launch: float


A100 = DataSheet(
    "A100 80 GB SXM",
    peaks={"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
    bandwidth=2.039e12,
    launch=5e-6,
)


def figures(sheet: DataSheet) -> DeviceFigures:
    """Figures that follow from a data sheet; each group of a grouped product is a kernel."""
    lines = {
        (op, backend, mode): Line(1.0, 1.0, number * sheet.launch)
        for (op, backend), launches in LAUNCHES.items()
        for mode, number in zip(("forward", "training"), launches, strict=True)
    }
    dtypes = {}
    for dtype, peak in sheet.peaks.items():
        rates = tuple((t, min(peak, 2 * t / BYTES[dtype] * sheet.bandwidth)) for t in THIN)
        dtypes[dtype] = DtypeFigures({"plain": rates, "grouped": rates}, lines)
    source = (
        f"derived, not measured: the data sheet of {sheet.name} and {sheet.launch * 1e6:g} µs for "
        "each start of a kernel"
    )
    return DeviceFigures(source, ((2**20, sheet.bandwidth),), sheet.launch, dtypes)

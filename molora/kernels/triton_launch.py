"""Launches of the programs: what they may run on, their tiles and grids."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from molora.errors import BackendError
from molora.kernels.triton_rows import Rows
from molora.kernels.triton_tiles import Tile, narrow_tile, outer_tile, widen_tile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAMS = 128
"""As many as fill a device (108 to 148 multiprocessors): a sum over rows is split for fewer."""


@dataclass(frozen=True)
class Weights:
    """gate · scaling of slots and experts.

    Attributes:
        gates: (slots, E), or of sorted slots (slots,), each with its own; None: 1.
        scaling_E: factor of each expert.
    """

    gates: Tensor | None
    scaling_E: Tensor


def require(x_TD: Tensor) -> None:
    """See that the programs can run on this tensor.

    Raises:
        BackendError: no triton, no device for it, or a dtype that it has no products for.
    """
    instead = "Use backend='dense' or 'reference'"
    try:
        interpreted = bool(_programs().INTERPRETED.value)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"backend='triton' needs triton ({error}). {instead}, or install triton."
        ) from error
    if x_TD.dtype not in DTYPES:
        raise BackendError(
            f"backend='triton' computes in bfloat16, float16 and float32, not {x_TD.dtype}. "
            f"{instead} for that."
        )
    if interpreted:
        return
    if x_TD.device.type != "cuda":
        raise BackendError(
            f"backend='triton' runs on CUDA and ROCm devices, and this tensor is on "
            f"{x_TD.device.type!r}. {instead} there, or set TRITON_INTERPRET=1 before Python "
            "starts to see the kernels run, slowly, on the CPU."
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(x_TD.device) < (8, 0):
        name = torch.cuda.get_device_name(x_TD.device)
        raise BackendError(
            f"backend='triton' is made for compute capability 8.0 and later, and {name} is older. "
            f"{instead} there."
        )


@cache
def _programs() -> ModuleType:
    # importing triton costs seconds, and it need not be installed
    from molora.kernels import triton_programs

    return triton_programs


def padded(rank: int, rows: Rows) -> int:
    """Columns that an expert takes: a power of two; 16 at least where a tile has one expert."""
    power = 1 << (rank - 1).bit_length()
    return max(power, 16) if rows.order is not None else power


def _columns(num_experts: int, rank: int, rows: Rows) -> int:
    """Columns of a tile's rows."""
    width = padded(rank, rows)
    return width if rows.order is not None else max(16, 1 << (num_experts * width - 1).bit_length())


def narrow(
    rows: Rows,
    x: Tensor,
    factor_ERD: Tensor,
    *,
    x_group: int = 1,
    weights: Weights | None = None,
    h: Tensor | None = None,
    h_group: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """x Wᵀ of every expert, or of sorted rows of the slot's own; times gate · scaling if given.

    Args:
        rows: the slots.
        x: (slots / x_group, D).
        factor_ERD: W; any strides.
        weights: None: 1.
        h: what the result is the gradient of, (slots / h_group, columns): with it the gates'
            gradients are computed too.

    Returns:
        (slots, E·R) or (slots, R), in the dtype of x; (slots, E) or (slots,) in float32, or None.
    """
    num_experts, rank, depth = factor_ERD.shape
    is_sorted = rows.order is not None
    width, columns = padded(rank, rows), _columns(num_experts, rank, rows)
    tile = narrow_tile(rows.block, columns, depth, x.dtype)
    blocks = -(-columns // tile.block_p)
    out = x.new_empty(rows.count, rank if is_sorted else num_experts * rank)
    sums = None
    if h is not None:
        experts = 1 if is_sorted else num_experts
        sums = x.new_empty(rows.count, experts * max(1, width // tile.block_p), dtype=torch.float32)
    _launch(
        "narrow",
        (blocks, rows.lists * rows.tiles_per_list, 1),
        rows,
        tile,
        weights,
        x=_matrix(x, x_group),
        depth=depth,
        factor=_factor(_read(factor_ERD, x.dtype, rows)),
        out=_matrix(out, 1, rank),
        h=None if h is None else _matrix(h, h_group, rank),
        grad_gates=None if sums is None else _matrix(sums, 1),
        E=num_experts,
        R=rank,
        R_PAD=width,
        GRAD_GATES=sums is not None,
    )
    if sums is None:
        return out, None
    if is_sorted:
        return out, sums.sum(dim=1)
    return out, rearrange(sums, "n (e s) -> n e s", e=num_experts).sum(dim=2)


def widen(
    rows: Rows,
    h: Tensor,
    factor_ERD: Tensor,
    out: Tensor,
    *,
    add: bool,
    h_group: int = 1,
    out_group: int = 1,
    weights: Weights | None = None,
) -> None:
    """h W, times gate · scaling if given, written or added to `out`, (slots / out_group, D)."""
    num_experts, rank, depth = factor_ERD.shape
    columns = _columns(num_experts, rank, rows)
    tile = widen_tile(rows.block, columns, depth, out.dtype)
    # lists that share rows of `out` take turns
    turns = rows.lists if out_group > 1 else 1
    tiles = rows.lists * rows.tiles_per_list // turns
    factor = _factor(_read(factor_ERD, out.dtype, rows))
    for turn in range(turns):
        _launch(
            "widen",
            (tiles, -(-depth // tile.block_d), 1),
            rows,
            tile,
            weights,
            first_tile=turn * tiles,
            h=_matrix(h, h_group, rank),
            depth=depth,
            factor=factor,
            out=_matrix(out, out_group),
            E=num_experts,
            R=rank,
            R_PAD=padded(rank, rows),
            ADD=add or turn > 0,
        )


def outer(
    rows: Rows,
    h: Tensor,
    x: Tensor,
    like_ERD: Tensor,
    *,
    h_group: int = 1,
    x_group: int = 1,
    weights: Weights | None = None,
) -> Tensor:
    """hᵀ x of every expert's rows, times gate · scaling if given: like `like_ERD` in all."""
    num_experts, rank, depth = like_ERD.shape
    if rows.count == 0:
        return torch.zeros_like(like_ERD)
    is_sorted = rows.order is not None
    width, columns = padded(rank, rows), _columns(num_experts, rank, rows)
    tile = outer_tile(rows.block, columns, depth, x.dtype)
    blocks = -(-columns // tile.block_p) * (num_experts if is_sorted else 1)
    grid = (blocks, -(-depth // tile.block_d))
    parts = min(-(-PROGRAMS // (grid[0] * grid[1])), -(-rows.count // tile.block_m))
    out = torch.empty_like(like_ERD)
    sums, part = out, 0
    if parts > 1:
        part = out.numel()
        strides = (part, *out.stride())
        sums = out.new_empty_strided((parts, *out.shape), strides, dtype=torch.float32)
    _launch(
        "outer",
        (*grid, parts),
        rows,
        tile,
        weights,
        h=_matrix(h, h_group, rank),
        x=_matrix(x, x_group),
        depth=depth,
        out=_factor(sums[0] if parts > 1 else sums),
        part=part,
        E=num_experts,
        R=rank,
        R_PAD=width,
    )
    return out.copy_(sums.sum(dim=0)) if parts > 1 else out


def _read(factor_ERD: Tensor, dtype: torch.dtype, rows: Rows) -> Tensor:
    """The factor in the dtype of the product, where many tiles read it.

    The programs round what they load, so a few tiles do without a copy. Many would each fetch
    twice the bytes from the cache: a copy is 6 bytes an element, once.
    """
    return factor_ERD.to(dtype) if rows.tiles_per_list > 4 else factor_ERD


def _matrix(rows: Tensor, group: int, rank: int = 0) -> Any:
    """`rank`: rows are the ranks of several experts, or of one that all slots read."""
    expert = rank if rows.shape[1] > rank else 0
    return _programs().Matrix(rows, rows.stride(0), group, expert)


def _factor(factor_ERD: Tensor) -> Any:
    return _programs().Factor(factor_ERD, *factor_ERD.stride())


def _gates(weights: Weights | None) -> Any:
    gates_of = _programs().Gates
    if weights is None:
        return gates_of(None, 0, 0, None)
    if weights.gates is None:
        return gates_of(None, 0, 0, weights.scaling_E)
    strides = (*weights.gates.stride(), 0)[:2]
    return gates_of(weights.gates, *strides, weights.scaling_E)


def _launch(
    name: str,
    grid: tuple[int, int, int],
    rows: Rows,
    tile: Tile,
    weights: Weights | None,
    **arguments: Any,
) -> None:
    if 0 in grid:
        return
    programs = _programs()
    slots = programs.Slots(rows.count, rows.order, rows.tiles, rows.starts, rows.lists)
    with _device_of(arguments["h"] or arguments["x"]):
        getattr(programs, name)[grid](
            slots=slots,
            gates=_gates(weights),
            SORTED=rows.order is not None,
            WEIGHTED=weights is not None,
            GATED=weights is not None and weights.gates is not None,
            BLOCK_M=tile.block_m,
            BLOCK_P=tile.block_p,
            BLOCK_D=tile.block_d,
            **_options(tile),
            **arguments,
        )


def _options(tile: Tile) -> dict[str, int]:
    if torch.version.hip is not None:
        # there is no limit of registers there, and a third stage spills scalar ones
        return {"num_warps": tile.num_warps, "num_stages": min(tile.num_stages, 2)}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    return options


def _device_of(matrix: Any) -> AbstractContextManager[None]:
    """triton launches on the current device, which need not be the tensors'."""
    if matrix.at.device.type != "cuda":
        return nullcontext()
    return torch.cuda.device(matrix.at.device)

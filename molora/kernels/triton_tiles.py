"""Sizes of the programs, for which no target spills registers; docs/kernels.md has the table.

Products of float32 without TF32 run outside the matrix units, with operands in registers: their
tiles are smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows, columns and the part of D that a program holds at a time, and what it runs on.

    Attributes:
        max_registers: of a thread, on CUDA; None: as the assembler finds best, which now and then
            is to spill a few for one more program on a multiprocessor.
    """

    block_m: int
    block_p: int
    block_d: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def rows_of(rows: int, dtype: torch.dtype) -> int:
    """Rows of a tile for so many rows: a power of two, at least a matrix unit's 16."""
    most = 32 if dtype == torch.float32 else 64
    return min(most, max(16, 1 << max(rows - 1, 0).bit_length()))


def narrow_tile(rows: int, columns: int, depth: int, dtype: torch.dtype) -> Tile:
    block_d = 32 if dtype == torch.float32 else 64
    return _tile(rows, min(columns, 64), _part(block_d, depth), _warps(columns, dtype), 3)


def widen_tile(rows: int, columns: int, depth: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(rows, min(columns, 32), _part(64, depth), num_warps=8, num_stages=2)
    # a second block of columns is fetched beside the first: both have to fit
    return _tile(rows, columns if columns <= 64 else 32, _part(128, depth), 8, 2)


def outer_tile(rows: int, columns: int, depth: int, dtype: torch.dtype) -> Tile:
    block_p, block_d = (64, 32) if dtype == torch.float32 else (128, 64)
    return _tile(rows, min(columns, block_p), _part(block_d, depth), _warps(columns, dtype), 2)


def _tile(block_m: int, block_p: int, block_d: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(block_m, block_p, block_d, num_warps, num_stages, max_registers=168)


def _part(most: int, depth: int) -> int:
    # rows that are not aligned are read element by element: each has an address and a mask
    return most if depth % 16 == 0 else most // 2


def _warps(columns: int, dtype: torch.dtype) -> int:
    # four would do for the sums, but not for the masks and addresses of wide tiles
    return 8 if columns >= 32 or dtype == torch.float32 else 4

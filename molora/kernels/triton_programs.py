# mypy: disable-error-code="no-untyped-def"
"""The programs that run on the device: narrow, widen and outer, over rows as they come or sorted.

A factor is (E, R, D) here: lora_A as it is, lora_B seen with R before D. Columns are ranks of
experts, expert by expert and each padded to R_PAD, a power of two. Rows come in tiles: as they
come a tile has every expert's columns, sorted by expert (SORTED) it has those of one. What is
asked of a row is asked of its slot: several slots may share a row. Sums are in float32, and no
program writes what another writes, so that results do not depend on an order.

Importing this file needs triton: the first call of the backend does.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


class Matrix(NamedTuple):
    """Rows: element (slot // group) · row + expert · `expert` + rank, or + a place in D."""

    at: Any
    row: Any
    group: Any = 1
    expert: Any = 0


class Factor(NamedTuple):
    """Element expert · `expert` + rank · `rank` + place · `depth`."""

    at: Any
    expert: Any
    rank: Any
    depth: Any


class Gates(NamedTuple):
    """gate at slot · row + expert · `expert`, and the scaling of every expert."""

    at: Any
    row: Any
    expert: Any
    scaling: Any


class Slots(NamedTuple):
    """How many rows there are; if sorted: slots in order, and where a tile or expert starts.

    `tiles` has for each tile its expert, its first position in `order` and that after the expert's
    last.
    `starts` has for each of `groups` sorted lists the positions where experts start, and its end.
    """

    count: Any
    order: Any = None
    tiles: Any = None
    starts: Any = None
    groups: Any = 1


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """float32 values in the precision of DTYPE."""
    # the interpreter cuts bfloat16 off instead of rounding, and multiplies its bits as integers
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return values.to(DTYPE)


@triton.jit
def rows_of_tile(tile, slots, BLOCK_M: tl.constexpr, SORTED: tl.constexpr):
    """The slots (BLOCK_M,) of a tile, which of them exist, and the tile's expert."""
    steps = tl.arange(0, BLOCK_M)
    if SORTED:
        expert = tl.load(slots.tiles + 3 * tile)
        positions = tl.load(slots.tiles + 3 * tile + 1) + steps
        exist = positions < tl.load(slots.tiles + 3 * tile + 2)
        members = tl.load(slots.order + positions, mask=exist, other=0)
    else:
        expert = 0
        members = tile * BLOCK_M + steps
        exist = members < slots.count
    return members.to(tl.int64), exist, expert


@triton.jit
def ranks_of(
    columns, expert, E: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, SORTED: tl.constexpr
):
    """The expert and rank of columns, and which of them exist."""
    if SORTED:
        experts = expert + columns * 0
        ranks = columns
        exist = ranks < R
    else:
        experts = columns // R_PAD
        ranks = columns % R_PAD
        exist = (experts < E) & (ranks < R)
    return experts, ranks, exist


@triton.jit
def gates_of(
    gates,
    members,
    exist,
    first,
    expert,
    E: tl.constexpr,
    R_PAD: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gate of each slot in the BLOCK_P columns from `first`, (BLOCK_M, BLOCK_P) in float32."""
    WIDTH: tl.constexpr = R_PAD if R_PAD < BLOCK_P else BLOCK_P
    SHARE: tl.constexpr = BLOCK_P // WIDTH
    BLOCK_M: tl.constexpr = members.shape[0]
    # each gate is loaded once and spread: by columns its addresses alone would fill the registers
    steps = tl.arange(0, SHARE)
    experts = expert + steps if SORTED else first // R_PAD + steps
    at = gates.at + members[:, None] * gates.row + experts[None, :] * gates.expert
    values = tl.load(at, mask=exist[:, None] & (experts < E)[None, :], other=0.0)
    spread = tl.broadcast_to(values.to(tl.float32)[:, :, None], (BLOCK_M, SHARE, WIDTH))
    return tl.reshape(spread, (BLOCK_M, BLOCK_P))


@triton.jit
def scaling_of(gates, experts, present):
    """The scaling of columns' experts, in float32."""
    return tl.load(gates.scaling + experts, mask=present, other=0.0).to(tl.float32)


@triton.jit
def narrow(
    slots,
    x,  # rows of D
    depth,  # D
    factor,
    out,
    gates,
    h,  # whose gradient `out` is
    grad_gates,  # a row of partial sums for each slot
    E: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    SORTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GATED: tl.constexpr,
    GRAD_GATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = x Wᵀ, with WEIGHTED gate · scaling · x Wᵀ; and the gates' gradient, Σ_r h · x Wᵀ."""
    DTYPE: tl.constexpr = x.at.dtype.element_ty
    # blocks of columns are neighbours: what one of them reads of x is in the cache for the next
    members, exist, expert = rows_of_tile(tl.program_id(1), slots, BLOCK_M, SORTED)
    first_column = tl.program_id(0) * BLOCK_P
    columns = first_column + tl.arange(0, BLOCK_P)
    experts, ranks, present = ranks_of(columns, expert, E, R, R_PAD, SORTED)
    places = tl.arange(0, BLOCK_D)
    x_at = x.at + (members // x.group)[:, None] * x.row + places[None, :]
    factor_at = factor.at + (experts * factor.expert + ranks * factor.rank)[None, :]
    factor_at += places[:, None] * factor.depth

    sums = tl.full((BLOCK_M, BLOCK_P), 0.0, tl.float32)
    for first in range(0, depth, BLOCK_D):
        inside = places < depth - first
        x_tile = tl.load(x_at, mask=exist[:, None] & inside[None, :], other=0.0)
        factor_tile = tl.load(factor_at, mask=inside[:, None] & present[None, :], other=0.0)
        left, right = rounded(x_tile, DTYPE), rounded(factor_tile, DTYPE)
        sums = tl.dot(left, right, acc=sums, input_precision="ieee")
        x_at += BLOCK_D
        factor_at += BLOCK_D * factor.depth

    both = exist[:, None] & present[None, :]
    if WEIGHTED:
        sums = sums * scaling_of(gates, experts, present)[None, :]
    if GRAD_GATES:
        WIDTH: tl.constexpr = R_PAD if R_PAD < BLOCK_P else BLOCK_P
        SHARE: tl.constexpr = BLOCK_P // WIDTH
        h_at = h.at + (members // h.group)[:, None] * h.row
        h_tile = tl.load(h_at + (experts * h.expert + ranks)[None, :], mask=both, other=0.0)
        products = tl.reshape(h_tile.to(tl.float32) * sums, (BLOCK_M, SHARE, WIDTH))
        # tl.sum is this in a jit of its own, made when triton is imported: for a device or not
        totals = tl.reduce(products, 2, tl.standard._sum_combine)
        shares = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
        at = grad_gates.at + members[:, None] * grad_gates.row + shares[None, :]
        tl.store(at, totals, mask=exist[:, None] & (shares < grad_gates.row)[None, :])
    if GATED:
        sums *= gates_of(gates, members, exist, first_column, expert, E, R_PAD, SORTED, BLOCK_P)
    out_at = out.at + members[:, None] * out.row + (experts * out.expert + ranks)[None, :]
    tl.store(out_at, rounded(sums, DTYPE), mask=both)


@triton.jit
def widen(
    slots,
    first_tile,
    h,
    depth,  # D
    factor,
    out,  # rows of D
    gates,
    E: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    SORTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = h W, with WEIGHTED (gate · scaling · h) W; ADD: added to what `out` has."""
    DTYPE: tl.constexpr = out.at.dtype.element_ty
    COLUMNS: tl.constexpr = R_PAD if SORTED else E * R_PAD
    tile = first_tile + tl.program_id(0)
    members, exist, expert = rows_of_tile(tile, slots, BLOCK_M, SORTED)
    places = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = places < depth

    sums = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    for first in range(0, COLUMNS, BLOCK_P):
        columns = first + tl.arange(0, BLOCK_P)
        experts, ranks, present = ranks_of(columns, expert, E, R, R_PAD, SORTED)
        both = exist[:, None] & present[None, :]
        h_at = h.at + (members // h.group)[:, None] * h.row
        h_tile = tl.load(h_at + (experts * h.expert + ranks)[None, :], mask=both, other=0.0)
        if WEIGHTED:
            h_tile = h_tile.to(tl.float32) * scaling_of(gates, experts, present)[None, :]
        if GATED:
            h_tile *= gates_of(gates, members, exist, first, expert, E, R_PAD, SORTED, BLOCK_P)
        factor_at = factor.at + (experts * factor.expert + ranks * factor.rank)[:, None]
        factor_at += places[None, :] * factor.depth
        factor_tile = tl.load(factor_at, mask=present[:, None] & inside[None, :], other=0.0)
        left, right = rounded(h_tile, DTYPE), rounded(factor_tile, DTYPE)
        sums = tl.dot(left, right, acc=sums, input_precision="ieee")

    out_at = out.at + (members // out.group)[:, None] * out.row + places[None, :]
    both = exist[:, None] & inside[None, :]
    if ADD:
        sums += tl.load(out_at, mask=both, other=0.0).to(tl.float32)
    tl.store(out_at, rounded(sums, DTYPE), mask=both)


@triton.jit
def outer(
    slots,
    h,
    x,  # rows of D
    depth,  # D
    out,  # a factor for each part of the rows
    part,  # from one of them to the next
    gates,
    E: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    SORTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = hᵀ x of a part of the rows, with WEIGHTED (gate · scaling · h)ᵀ x."""
    DTYPE: tl.constexpr = x.at.dtype.element_ty
    BLOCKS: tl.constexpr = (R_PAD + BLOCK_P - 1) // BLOCK_P if SORTED else E * R_PAD
    block = tl.program_id(0) % BLOCKS
    expert = tl.program_id(0) // BLOCKS
    columns = block * BLOCK_P + tl.arange(0, BLOCK_P)
    experts, ranks, present = ranks_of(columns, expert, E, R, R_PAD, SORTED)
    places = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = places < depth

    sums = tl.full((BLOCK_P, BLOCK_D), 0.0, tl.float32)
    for group in range(slots.groups):
        start, end = 0, slots.count
        if SORTED:
            start = tl.load(slots.starts + group * (E + 1) + expert)
            end = tl.load(slots.starts + group * (E + 1) + expert + 1)
        first = start + tl.program_id(2) * BLOCK_M
        for position in range(first, end, BLOCK_M * tl.num_programs(2)):
            members = position + tl.arange(0, BLOCK_M)
            exist = members < end
            if SORTED:
                members = tl.load(slots.order + members, mask=exist, other=0)
            members = members.to(tl.int64)
            both = exist[:, None] & present[None, :]
            h_at = h.at + (members // h.group)[:, None] * h.row
            h_tile = tl.load(h_at + (experts * h.expert + ranks)[None, :], mask=both, other=0.0)
            if GATED:
                gate = gates_of(
                    gates, members, exist, block * BLOCK_P, expert, E, R_PAD, SORTED, BLOCK_P
                )
                h_tile = h_tile.to(tl.float32) * gate
            x_at = x.at + (members // x.group)[:, None] * x.row + places[None, :]
            x_tile = tl.load(x_at, mask=exist[:, None] & inside[None, :], other=0.0)
            left, right = tl.trans(rounded(h_tile, DTYPE)), rounded(x_tile, DTYPE)
            sums = tl.dot(left, right, acc=sums, input_precision="ieee")

    if WEIGHTED:
        sums *= scaling_of(gates, experts, present)[:, None]
    out_at = out.at + tl.program_id(2).to(tl.int64) * part
    out_at += (experts * out.expert + ranks * out.rank)[:, None] + places[None, :] * out.depth
    OUT: tl.constexpr = out.at.dtype.element_ty
    tl.store(out_at, rounded(sums, OUT), mask=present[:, None] & inside[None, :])

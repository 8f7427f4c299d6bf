"""Which rows the programs go over: as they come, or sorted by expert without a word to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molora.kernels.triton_tiles import rows_of


@dataclass(frozen=True)
class Rows:
    """The slots of a launch.

    Attributes:
        count: how many.
        lists: into how many lists they are sorted; every row of x has one slot in each.
        order: (count,) int32, slots sorted by expert, list by list; None: as they come.
        tiles: (lists, tiles, 3) int32, for each tile of `block` positions of `order` its expert,
            first position and that after the expert's last. As many as there can be; the rest is
            empty.
        starts: (lists, E + 1) int32, positions at which experts start, and the list's end.
        block: rows of a tile.
    """

    count: int
    block: int
    lists: int = 1
    order: Tensor | None = None
    tiles: Tensor | None = None
    starts: Tensor | None = None

    @property
    def tiles_per_list(self) -> int:
        if self.tiles is not None:
            return self.tiles.shape[1]
        return -(-self.count // self.block)


def as_they_come(count: int, dtype: torch.dtype) -> Rows:
    return Rows(count, rows_of(count, dtype))


class SharedRows:
    """The rows of one routing decision, sorted once for all that share it, if anyone sorts them."""

    def __init__(self, index_TK: Tensor, num_experts: int) -> None:
        self.index_TK, self.num_experts = index_TK, num_experts
        self._sorted: dict[int, Rows] = {}

    def rows(self, dtype: torch.dtype) -> Rows:
        """As `sorted_by_expert`."""
        block = rows_of(2**16, dtype)
        if block not in self._sorted:
            self._sorted[block] = sorted_by_expert(self.index_TK, self.num_experts, dtype)
        return self._sorted[block]


def sorted_by_expert(index_TK: Tensor, num_experts: int, dtype: torch.dtype) -> Rows:
    """One list for each of the K columns, whose slots t·K + k have each row once.

    Adding a list's results to rows is therefore free of conflicts: lists one after the other
    need no atomics and give the same bits every time.
    """
    tokens, slots = index_TK.shape
    block = rows_of(-(-tokens // num_experts), dtype)
    experts_KT, order_KT = index_TK.T.contiguous().sort(dim=1, stable=True)
    device = index_TK.device
    list_K1 = torch.arange(slots, device=device)[:, None]
    bounds_KB = torch.arange(num_experts + 1, device=device).expand(slots, -1).contiguous()
    starts_KB = torch.searchsorted(experts_KT, bounds_KB)

    # a tile is of one expert: each has its last one filled in part
    ends_KE = ((starts_KB.diff(dim=1) + block - 1) // block).cumsum(dim=1)
    most = tokens // block + min(num_experts, tokens)
    number_KM = torch.arange(most, device=device).expand(slots, -1).contiguous()
    expert_KM = torch.searchsorted(ends_KE, number_KM, right=True)
    exists_KM = expert_KM < num_experts
    expert_KM = expert_KM.clamp(max=num_experts - 1)
    before_KM = torch.nn.functional.pad(ends_KE, (1, 0)).gather(1, expert_KM)
    first_KM = starts_KB.gather(1, expert_KM) + (number_KM - before_KM) * block
    last_KM = torch.where(exists_KM, starts_KB.gather(1, expert_KM + 1), first_KM)
    tiles_KM3 = torch.stack(
        [expert_KM, first_KM + tokens * list_K1, last_KM + tokens * list_K1], dim=2
    )
    return Rows(
        count=tokens * slots,
        block=block,
        lists=slots,
        order=(order_KT * slots + list_K1).int().flatten(),
        tiles=tiles_KM3.int(),
        starts=(starts_KB + tokens * list_K1).int(),
    )

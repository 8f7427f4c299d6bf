"""What one forward of the model shares with its adapted modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from molora.errors import AttachError
from molora.routing.record import Routing


@dataclass(frozen=True)
class SideInputs:
    """What modules may need besides their input: padding masks and columns of the batch."""

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """Stream ("input", "encoder", "decoder") → (B, S_total) bool, False for padding; absent: no
    padding."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Column of the batch, such as `task_types` → (B,) int64; where rows are packed, one value for
    each of the batch's sequences."""
    segments: Tensor | None = None
    """(B, S) int64: which sequence of the batch a position belongs to, counted from 1, 0 for
    padding; None where every row is one sequence."""
    acting: Tensor | None = None
    """(B, S, E) bool: at which positions of this forward an expert may act; None: everywhere."""
    unreadable: str = ""
    """What kind of attention_mask was passed that cannot be read as padding; empty if it could."""

    def rows(self, stream: str, grid: tuple[int, ...]) -> Tensor | None:
        """(rows,) bool: which rows of a tensor with leading shape `grid` count; None: all.

        Under a KV cache the rows are the last positions of the mask.

        Raises:
            AttachError: rows that cannot be matched with the mask.
        """
        if self.unreadable:
            raise AttachError(
                f"attention_mask is {self.unreadable}, from which padding cannot be read. Pass a "
                "(batch, positions) mask of ones and zeros: losses, records and capacity must not "
                "count padding."
            )
        mask_BS = self.masks.get(stream)
        if mask_BS is None:
            return None
        batch, length = mask_BS.shape
        if len(grid) == 2 and grid[0] == batch and grid[1] <= length:
            return mask_BS[:, length - grid[1] :].reshape(-1)
        if grid == (batch * length,):
            return mask_BS.reshape(-1)
        if grid == (batch,):
            return None
        raise AttachError(
            f"rows of shape {grid} do not fit the {stream}'s attention_mask of shape "
            f"{tuple(mask_BS.shape)}: they must be (batch, positions), (batch · positions) or "
            "(batch). Pass an attention_mask for exactly these inputs."
        )

    def acting_rows(self, grid: tuple[int, ...]) -> Tensor | None:
        """(rows, E): `acting` for rows with the leading shape `grid`.

        Raises:
            AttachError: rows that are not the batch's positions.
        """
        if self.acting is None:
            return None
        if grid != tuple(self.acting.shape[:-1]):
            raise AttachError(
                f"rows of shape {grid} are not the batch's positions, "
                f"{tuple(self.acting.shape[:-1])}, by which some experts act (aLoRA). Leave these "
                "experts out for this base."
            )
        return self.acting.flatten(0, 1)

    def segment_rows(self, stream: str, grid: tuple[int, ...]) -> Tensor | None:
        """(rows,) int64: the sequence that each row of a tensor with leading shape `grid` belongs
        to, as in `segments`; None where rows are not packed or not those of the batch."""
        if self.segments is None or stream != "input":
            return None
        fits = grid == tuple(self.segments.shape) or grid == (self.segments.numel(),)
        return self.segments.flatten() if fits else None

    def starts(self, stream: str, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """(rows,) bool: which rows of a tensor with leading shape `grid` begin a sequence.

        Raises:
            AttachError: packed rows in another arrangement than the batch's.
        """
        segments_T = self.segment_rows(stream, grid)
        if segments_T is not None:
            starts_T = torch.ones_like(segments_T, dtype=torch.bool)
            starts_T[1:] = segments_T[1:] != segments_T[:-1]
            return starts_T
        if self.segments is not None and stream == "input":
            raise AttachError(
                f"rows of shape {grid} do not fit the packed batch of shape "
                f"{tuple(self.segments.shape)}: capacity counts the tokens of each sequence. Give "
                "every sequence a row of its own."
            )
        starts = torch.zeros(grid, dtype=torch.bool, device=device)
        starts.view(grid[0] if len(grid) > 1 else 1, -1)[:, :1] = True
        return starts.flatten()


class ForwardContext:
    """Shared by all adapted modules of one mixture; modules read attributes, never a ContextVar.

    Attributes:
        enabled: False makes every adapted module its base.
        trace: site → records of the forward that is running; None unless somebody asked. It is open
            only during the forward, so the recomputation of activation checkpointing records
            nothing twice.
        side: masks and columns of the running forward.
        decisions: site → decision that the linears of a running block or layer share.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.trace: dict[str, list[Routing]] | None = None
        self.side = SideInputs()
        self.decisions: dict[str, Routing] = {}

    @contextmanager
    def recomputing(self, side: SideInputs, decisions: dict[str, Routing]) -> Iterator[None]:
        """Bring back side inputs and decisions of an earlier forward, with the trace closed."""
        previous = self.side, self.trace, self.decisions
        self.side, self.trace, self.decisions = side, None, dict(decisions)
        try:
            yield
        finally:
            self.side, self.trace, self.decisions = previous

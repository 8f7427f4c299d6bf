"""The record that all axes of a mixture meet in."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """One routing decision for `rows` rows (tokens) over E experts, K slots each.

    Slots that are padded, dropped by capacity or absent have gate 0. Dense routing has K = E.
    """

    logits: Tensor | None
    """(rows, E) float32, raw; None where the decision does not come from logits."""
    scores: Tensor
    """(rows, E) float32, over all experts."""
    gates: Tensor
    """(rows, K), the values that multiply the experts' outputs."""
    expert_index: Tensor
    """(rows, K) int64, all different within a row."""
    selected: Tensor
    """(rows, K) bool, chosen by the selector, before capacity."""
    mask: Tensor | None = None
    """(rows,) bool, False for padding; None if every row counts."""
    grid: tuple[int, ...] = ()
    """Leading shape that the rows had, such as (batch, sequence); their product is `rows`."""
    segment_ids: Tensor | None = None
    """(rows,) int64: which sequence of the batch a row belongs to, from 1, 0 for padding; None
    where each index of the grid's first dimension is one sequence, or sequences are unknown."""
    in_order: bool = False
    """Whether slot k is expert k in every row, as in dense routing."""
    plans: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Backend → how it sorts these rows, once it did."""

    @property
    def num_experts(self) -> int:
        return self.scores.shape[-1]

    def dense_gates(self) -> Tensor:
        """(rows, E): the gate of every expert, 0 where it does not act; differentiable."""
        if self.in_order:
            return self.gates
        zeros = self.gates.new_zeros(self.gates.shape[0], self.num_experts)
        return zeros.scatter(1, self.expert_index, self.gates)

    def detach(self) -> Routing:
        """The same values without their graph."""
        detached: dict[str, Any] = {
            field.name: value.detach()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **detached)

    def valid_rows(self) -> Tensor:
        """(rows,) float32: 1 for rows that count, 0 for padding."""
        if self.mask is None:
            return torch.ones(self.scores.shape[0], dtype=torch.float32, device=self.scores.device)
        return self.mask.to(torch.float32)


def concatenate(records: list[Routing]) -> Routing:
    """Records of one width pooled along the rows, e.g. of one site over several forwards.

    Raises:
        ValueError: the records differ in the number of experts or slots.
    """
    if len(records) == 1:
        return records[0]
    widths = {(record.num_experts, record.gates.shape[1]) for record in records}
    if len(widths) > 1:
        raise ValueError(
            f"records of different (experts, slots) cannot be pooled: {sorted(widths)}."
        )
    masked = any(record.mask is not None for record in records)
    return Routing(
        logits=None
        if any(record.logits is None for record in records)
        else torch.cat([record.logits for record in records if record.logits is not None]),
        scores=torch.cat([record.scores for record in records]),
        gates=torch.cat([record.gates for record in records]),
        expert_index=torch.cat([record.expert_index for record in records]),
        selected=torch.cat([record.selected for record in records]),
        mask=torch.cat([record.valid_rows().bool() for record in records]) if masked else None,
        grid=(sum(record.scores.shape[0] for record in records),),
    )

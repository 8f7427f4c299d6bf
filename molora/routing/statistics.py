"""What a router did, as numbers, on its device and without synchronisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from molora.routing.record import Routing


def expert_counts(record: Routing) -> Tensor:
    """(E,) float32: number of rows that each expert acts on.

    Counts slots that act (selected, gate ≠ 0) of rows that are not padding.
    """
    acting_TK = (record.selected & (record.gates != 0)).float() * record.valid_rows()[:, None]
    return _scatter_sum(record, acting_TK)


def gate_mass(record: Routing) -> Tensor:
    """(E,) float32: sum of the gates of each expert over rows that are not padding."""
    return _scatter_sum(record, record.gates.float() * record.valid_rows()[:, None])


def entropy(record: Routing) -> Tensor:
    """Scalar: mean entropy of a row's normalised scores, in nats; log E at uniform routing."""
    valid_T = record.valid_rows()
    tiny = torch.finfo(torch.float32).tiny
    p_TE = record.scores / record.scores.sum(dim=-1, keepdim=True).clamp_min(tiny)
    # p log p has an infinite slope at 0, where softmax underflows: 0 · inf would poison the step
    entropy_T = torch.special.entr(p_TE.clamp_min(tiny)).sum(dim=-1)
    return (entropy_T * valid_T).sum() / valid_T.sum().clamp_min(1)


def _scatter_sum(record: Routing, values_TK: Tensor) -> Tensor:
    sums_E = torch.zeros(record.num_experts, dtype=torch.float32, device=record.scores.device)
    return sums_E.scatter_add(0, record.expert_index.flatten(), values_TK.flatten())


class LoadStatistics:
    """Running counts of what each expert of each site served, on the device until read."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def update(self, records: Mapping[str, Sequence[Routing]]) -> None:
        """Add the records of one forward."""
        for site, site_records in records.items():
            counts_E = torch.stack([expert_counts(record.detach()) for record in site_records]).sum(
                dim=0
            )
            self._counts[site] = self._counts[site] + counts_E if site in self._counts else counts_E

    def counts(self) -> dict[str, Tensor]:
        """Site → (E,) float32 on its device: number of rows that each expert acted on."""
        return dict(self._counts)

    def loads(self) -> dict[str, Tensor]:
        """Site → (E,) float32 on its device: share of the choices that fell on each expert."""
        return {site: counts / counts.sum().clamp_min(1) for site, counts in self._counts.items()}

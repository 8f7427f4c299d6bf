"""What a router did, as numbers, on its device and without synchronisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from molora.routing.record import Routing

STACKED_SCORES = 2**22
"""Scores that are looked at together: bounds what `RoutingStatistics` allocates, 16 MiB a copy."""


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
    # p log p has an infinite slope at 0, where softmax underflows: 0 · inf would poison the step
    p_TE = probabilities(record.scores).clamp_min(torch.finfo(torch.float32).tiny)
    entropy_T = torch.special.entr(p_TE).sum(dim=-1)
    return (entropy_T * valid_T).sum() / valid_T.sum().clamp_min(1)


def probabilities(scores: Tensor) -> Tensor:
    """Sizes of scores (..., E) of any score function divided by their sum; fixed weights may be
    negative."""
    scores = scores.abs()
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _scatter_sum(record: Routing, values_TK: Tensor) -> Tensor:
    sums_E = torch.zeros(record.num_experts, dtype=torch.float32, device=record.scores.device)
    return sums_E.scatter_add(0, record.expert_index.flatten(), values_TK.flatten())


class RoutingStatistics:
    """Running sums of what the router of each site did, on the device until read.

    Rows that are padding are left out. Sites whose records have one shape are summed together, so
    that the number of operations does not grow with the number of sites.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def update(self, records: Mapping[str, Sequence[Routing]]) -> None:
        """Add the records of one forward."""
        for sites, alike in _by_shape(records):
            together = max(1, STACKED_SCORES // max(1, alike[0].scores.numel()))
            parts = (alike[i : i + together] for i in range(0, len(alike), together))
            sums_SN = torch.cat([row_sums(part) for part in parts])
            known_SN = self._sums.get(sites)
            self._sums[sites] = sums_SN if known_SN is None else known_SN + sums_SN

    def sums(self) -> dict[str, Tensor]:
        """Site → (2E + 3,) on its device, see `row_sums`."""
        found: dict[str, Tensor] = {}
        for sites, sums_SN in self._sums.items():
            for site, sums_N in zip(sites, sums_SN, strict=True):
                found[site] = found[site] + sums_N if site in found else sums_N
        return found

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add what `sums` of another count returned."""
        for site, sums_N in sums.items():
            known_1N = self._sums.get((site,))
            self._sums[(site,)] = sums_N[None] if known_1N is None else known_1N + sums_N

    def counts(self) -> dict[str, Tensor]:
        """Site → (E,) on its device: number of rows that each expert acted on."""
        return {site: Sums(sums_N).counts for site, sums_N in self.sums().items()}

    def loads(self) -> dict[str, Tensor]:
        """Site → (E,) float32 on its device: share of the choices that fell on each expert."""
        counts = self.counts().items()
        return {site: (n_E / n_E.sum().clamp_min(1)).float() for site, n_E in counts}

    def entropies(self) -> dict[str, Tensor]:
        """Site → scalar: mean entropy of a row's normalised scores, in nats."""
        return {site: Sums(sums_N).entropy for site, sums_N in self.sums().items()}

    def margins(self) -> dict[str, Tensor]:
        """Site → scalar: mean over rows of the highest normalised score less the second."""
        return {site: Sums(sums_N).margin for site, sums_N in self.sums().items()}


class Sums:
    """Names for the parts of one site's sums, on any device.

    Attributes:
        counts: (E,) number of rows that each expert acted on.
        mass: (E,) sum of each expert's normalised score.
        rows: number of rows.
        entropy: mean entropy of a row's normalised scores, in nats.
        margin: mean of the highest normalised score less the second.
    """

    def __init__(self, sums_N: Tensor) -> None:
        num_experts = (sums_N.numel() - 3) // 2
        self.counts, self.mass, self._rest = sums_N.split([num_experts, num_experts, 3])
        self.rows = self._rest[0]

    @property
    def entropy(self) -> Tensor:
        return self._rest[1] / self.rows.clamp_min(1)

    @property
    def margin(self) -> Tensor:
        return self._rest[2] / self.rows.clamp_min(1)

    @property
    def num_experts(self) -> int:
        return self.counts.numel()


@torch.no_grad()
def row_sums(records: Sequence[Routing]) -> Tensor:
    """(S, 2E + 3) sums over the rows of S records of one shape.

    Choices and normalised scores of each expert, then the rows, their entropies in nats, and their
    margins between the highest and the second normalised score. float64, or float32 on devices
    without it.
    """
    p_STE = probabilities(torch.stack([record.scores for record in records]))
    # float64 models have scores of float64
    valid_ST = _valid(records).to(p_STE.dtype)
    per_row_S3T = torch.stack([torch.ones_like(valid_ST), _entropy(p_STE), _margin(p_STE)], dim=1)
    sums = [
        _counts(records, valid_ST, num_experts=p_STE.shape[-1]),
        torch.einsum("ste,st->se", p_STE, valid_ST),
        torch.einsum("snt,st->sn", per_row_S3T, valid_ST),
    ]
    return torch.cat(sums, dim=1).to(accumulator(valid_ST.device))


def accumulator(device: torch.device) -> torch.dtype:
    """What sums over many steps are kept in: float32 counts nothing beyond 2²⁴."""
    return torch.float32 if device.type == "mps" else torch.float64


def _valid(records: Sequence[Routing]) -> Tensor:
    """(S, T) float32: 1 for rows that count, 0 for padding."""
    masks = [record.mask for record in records if record.mask is not None]
    if len(masks) == len(records):
        return torch.stack(masks).float()
    if masks:
        return torch.stack([record.valid_rows() for record in records])
    scores_TE = records[0].scores
    shape = (len(records), len(scores_TE))
    return torch.ones(shape, dtype=torch.float32, device=scores_TE.device)


def _counts(records: Sequence[Routing], valid_ST: Tensor, *, num_experts: int) -> Tensor:
    # stacked first: the number of operations is that of one site
    gates_STK = torch.stack([record.gates for record in records])
    acting_STK = torch.stack([record.selected for record in records]) & (gates_STK != 0)
    index_STK = torch.stack([record.expert_index for record in records])
    # one dimension: the only form of scatter_add that is deterministic on a GPU
    first_S = torch.arange(len(records), device=index_STK.device) * num_experts
    counts = valid_ST.new_zeros(len(records) * num_experts)
    counts = counts.scatter_add(
        0,
        (index_STK + first_S[:, None, None]).flatten(),
        (acting_STK * valid_ST[..., None]).flatten(),
    )
    return rearrange(counts, "(s e) -> s e", s=len(records))


def _entropy(p_STE: Tensor) -> Tensor:
    return torch.special.entr(p_STE).sum(dim=-1)


def _margin(p_STE: Tensor) -> Tensor:
    if p_STE.shape[-1] == 1:
        return p_STE[..., 0]
    first, second = p_STE.topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


def _by_shape(
    records: Mapping[str, Sequence[Routing]],
) -> Iterator[tuple[tuple[str, ...], list[Routing]]]:
    """Records that can be stacked, with the site of each."""
    groups: dict[object, list[tuple[str, Routing]]] = {}
    for site, site_records in records.items():
        for record in site_records:
            key = (record.scores.shape, record.expert_index.shape, record.scores.device)
            groups.setdefault(key, []).append((site, record))
    for members in groups.values():
        yield tuple(site for site, _ in members), [record for _, record in members]

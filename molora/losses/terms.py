"""Auxiliary loss terms: pure functions of one pooled `Routing` record → scalar float32.

All are 0, finite and still in the graph when no row counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from molora.errors import ConfigError
from molora.routing import statistics
from molora.routing.record import Routing

RecordTerm = Callable[[Routing], Tensor]
NO_LABEL = -100
"""Label of a sequence that belongs to no expert."""


def load_balance(
    record: Routing, *, form: Literal["normalized", "slots", "switch", "unscaled"]
) -> Tensor:
    """Σ_e f_e P_e, times E except in the form "unscaled".

    P is the mean of the full scores, f the routed fraction.

    Value at uniform routing: normalized 1 (MoLA, 2402.08562), slots k (MixLoRA, 2404.15159; GOAT),
    switch 1 (Switch Transformer, 2101.03961, Eq. 4), unscaled k/E (LLaVA-MoLE, 2401.16160). One
    collapsed expert gives E for k = 1. f is a hard count and has no gradient. Padding is left out,
    unlike in MoLA's code.
    """
    valid_T = record.valid_rows()
    rows = valid_T.sum().clamp_min(1)
    mean_score_E = (record.scores * valid_T[:, None]).sum(dim=0) / rows
    if form == "switch":
        index_TK = record.scores.argmax(dim=-1, keepdim=True)
        selected_TK = torch.ones_like(index_TK, dtype=torch.bool)
    else:
        index_TK, selected_TK = record.expert_index, record.selected
    hits_TK = (selected_TK * valid_T[:, None]).to(mean_score_E.dtype)
    counts_E = torch.zeros_like(mean_score_E).scatter_add(0, index_TK.flatten(), hits_TK.flatten())
    fraction_E = counts_E / (counts_E.sum().clamp_min(1) if form == "normalized" else rows)
    product = (fraction_E * mean_score_E).sum()
    return product if form == "unscaled" else record.num_experts * product


def importance(record: Routing) -> Tensor:
    """CV² of the gate mass per expert, variance / mean²; 0 at uniform routing.

    Source: Shazeer et al., 1701.06538, Eq. 6–7.
    """
    mass_E = statistics.gate_mass(record)
    return mass_E.var(unbiased=False) / (mass_E.mean() ** 2 + 1e-10)


def log_balance(record: Routing) -> Tensor:
    """−Σ_e log P_e, P the mean of the scores; E log E at uniform routing (MoLE, 2404.13628).

    Experts that cannot be chosen here, with a logit of −∞ in every row, are left out.
    """
    valid_T = record.valid_rows()
    rows = valid_T.sum()
    mean_score_E = (record.scores * valid_T[:, None]).sum(dim=0) / rows.clamp_min(1)
    log_E = mean_score_E.clamp_min(torch.finfo(mean_score_E.dtype).tiny).log()
    if record.logits is not None:
        log_E = log_E * (record.logits > -torch.inf).any(dim=0)
    return -log_E.sum() * (rows > 0)


def localized_balance(record: Routing, *, delta: float, task_types_B: Tensor) -> Tensor:
    """LoRAMoE's constraint: var(Z) / mean(Z)², Z = Q · I (2312.09979).

    Q[b, e] is the summed score of expert e in sequence b. I is 1 + delta where a sequence of type 1
    meets an expert of the first half or one of type 0 an expert of the second half, else 1 − delta;
    at the minimum Q is proportional to 1 / I, so type 1 leans on the second half.
    The variance is unbiased and divided by the squared mean, as in the authors' code; the paper
    prints the mean. Flat routing gives about delta² · n / (n − 1) over the n = B · E values of a
    balanced batch. Padding is left out, unlike in their code.

    Raises:
        ConfigError: task types that are not one value per sequence. Whether it is 0 or 1 is not
            looked at, since reading values would wait for the device.
    """
    mass_BE = _mass_by_sequence(record, task_types_B)
    first_half_E = torch.arange(record.num_experts, device=mass_BE.device) < record.num_experts // 2
    raised_BE = task_types_B[:, None].bool() == first_half_E
    z_N = (mass_BE * torch.where(raised_BE, 1 + delta, 1 - delta)).flatten()
    return z_N.var(unbiased=True) / (z_N.mean() ** 2 + 1e-10)


def task_cross_entropy(record: Routing, *, expert_labels_B: Tensor) -> Tensor:
    """Mean over rows with a label of −log softmax(logits)[label]; log E at equal logits.

    A row has its sequence's label; −100 is none, and so is an expert that cannot be chosen here
    (logit −∞). As MeteoRA's code (2405.13053), which counts padding too, and MoA (2403.03432).

    Raises:
        ConfigError: labels that are not one value per sequence, or of no expert (looked at on the
            CPU only, since reading values would wait for the device); a router without logits.
    """
    if record.logits is None:
        raise ConfigError(
            "the task cross entropy compares logits with labels, but this router's gates do not "
            "come from logits. Leave the loss out."
        )
    label_T = _by_row(record, expert_labels_B)
    known_T = label_T != NO_LABEL
    index_T = torch.where(known_T, label_T, 0)
    if index_T.device.type == "cpu" and not torch.compiler.is_compiling():
        lowest, highest = (int(v) for v in torch.aminmax(index_T)) if index_T.numel() else (0, 0)
        if lowest < 0 or highest >= record.num_experts:
            raise ConfigError(
                f"expert_labels has {lowest if lowest < 0 else highest}, but the experts are 0 to "
                f"{record.num_experts - 1}; {NO_LABEL} is none."
            )
    found_T = torch.log_softmax(record.logits, dim=-1).gather(1, index_T[:, None])[:, 0]
    counts_T = known_T & found_T.isfinite()
    weight_T = counts_T * record.valid_rows()
    # a product with 0 would leave the NaN of an infinite logit in the gradient
    return -(torch.where(counts_T, found_T, 0) * weight_T).sum() / weight_T.sum().clamp_min(1)


def _by_row(record: Routing, values_B: Tensor) -> Tensor:
    """(rows,) int64: the value of each row's sequence, NO_LABEL for padding between packed ones.

    Raises:
        ConfigError: as `_mass_by_sequence`.
    """
    found = tuple(values_B.shape)
    if record.segment_ids is None:
        sequences = record.grid[:1]
        if found == sequences:
            rows = record.scores.shape[0]
            return values_B.repeat_interleave(rows // max(1, found[0]), output_size=rows)
    else:
        on_cpu = record.segment_ids.device.type == "cpu"
        sequences = (int(record.segment_ids.max()),) if on_cpu else found
        if len(found) == 1 and found == sequences:
            none = values_B.new_full((1,), NO_LABEL)
            return torch.cat([none, values_B])[record.segment_ids]
    raise ConfigError(
        f"expert_labels has shape {found}, but the task cross entropy needs one value per "
        f"sequence, {sequences}."
    )


def _mass_by_sequence(record: Routing, task_types_B: Tensor) -> Tensor:
    """(B, E): summed scores of every sequence, of packed ones too."""
    scores_TE = record.scores * record.valid_rows()[:, None]
    found = tuple(task_types_B.shape)
    if record.segment_ids is None:
        sequences = record.grid[:1]
        if found == sequences:
            return rearrange(scores_TE, "(b s) e -> b s e", b=record.grid[0]).sum(dim=1)
    else:
        # on other devices reading the number would wait; there index_add refuses too few types
        on_cpu = record.segment_ids.device.type == "cpu"
        sequences = (int(record.segment_ids.max()),) if on_cpu else found
        if len(found) == 1 and found == sequences:
            mass_GE = scores_TE.new_zeros(found[0] + 1, record.num_experts)
            return mass_GE.index_add(0, record.segment_ids, scores_TE)[1:]
    raise ConfigError(
        f"task_types has shape {found}, but the localized balance loss needs one value per "
        f"sequence, {sequences}."
    )


def router_z(record: Routing) -> Tensor:
    """Mean of logsumexp(logits)² (ST-MoE, 2202.08906, Eq. 5); (log E)² at zero logits."""
    assert record.logits is not None
    valid_T = record.valid_rows()
    return (torch.logsumexp(record.logits, dim=-1) ** 2 * valid_T).sum() / valid_T.sum().clamp_min(
        1
    )


def routing_entropy(record: Routing) -> Tensor:
    """Mean entropy of a row's normalised scores in nats; log E at uniform routing."""
    return statistics.entropy(record)

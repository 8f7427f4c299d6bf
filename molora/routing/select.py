"""Scores → (gates, expert_index, selected): which experts act on a row, and with what gate.

Every selector is a pure function of ``scores_TE`` (T rows, E experts) and returns three (T, K)
tensors: gates (differentiable in the scores unless said otherwise), expert indices (int64, distinct
in a row), and which slots are chosen (bool). A slot that is not chosen has gate 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Selection = tuple[Tensor, Tensor, Tensor]
SelectFunction = Callable[[Tensor], Selection]


def dense(scores_TE: Tensor) -> Selection:
    """Every expert acts with its score; K = E."""
    num_rows, num_experts = scores_TE.shape
    expert_index = torch.arange(num_experts, device=scores_TE.device).expand(num_rows, num_experts)
    return scores_TE, expert_index, torch.ones_like(scores_TE, dtype=torch.bool)


def top_k(scores_TE: Tensor, k: int, *, renormalize: bool, softmax: bool = False) -> Selection:
    """The k highest scores of each row, best first, divided by their sum if `renormalize`.

    With `softmax` the gates are its values over those of them that are not 0 (X-LoRA's
    `enable_softmax_topk`).
    """
    gates_TK, index_TK = torch.topk(scores_TE, k, dim=-1)
    if softmax:
        out_TK = gates_TK == 0
        # a row without any would be 0/0
        kept_TK = gates_TK.masked_fill(out_TK & ~out_TK.all(dim=-1, keepdim=True), -torch.inf)
        gates_TK = torch.softmax(kept_TK, dim=-1).masked_fill(out_TK, 0)
    elif renormalize:
        gates_TK = _renormalized(gates_TK)
    return gates_TK, index_TK, torch.ones_like(index_TK, dtype=torch.bool)


def top_p(scores_TE: Tensor, p: float, *, renormalize: bool) -> Selection:
    """The fewest best experts whose scores together exceed p; K = E slots.

    The expert that crosses p is included.

    Source: MixLoRA's dynamic variant (2404.15159), which does not renormalise.
    """
    sorted_TE, index_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
    before_TE = sorted_TE.detach().cumsum(dim=-1) - sorted_TE.detach()
    return _keep(sorted_TE, index_TE, before_TE <= p, renormalize=renormalize)


def threshold(scores_TE: Tensor, minimum: float, *, renormalize: bool) -> Selection:
    """Experts whose score exceeds `minimum`, and always the best one; K = E slots, best first."""
    sorted_TE, index_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
    chosen_TE = sorted_TE > minimum
    chosen_TE[:, 0] = True
    return _keep(sorted_TE, index_TE, chosen_TE, renormalize=renormalize)


def unit_top1(scores_TE: Tensor, *, straight_through: bool = False) -> Selection:
    """The best expert with gate exactly 1.

    With `straight_through` the gate has the gradient of its score (Bengio et al., 1308.3432), else
    none.
    """
    best_T1, index_T1 = scores_TE.max(dim=-1, keepdim=True)
    gates_T1 = torch.ones_like(best_T1)
    if straight_through:
        gates_T1 = gates_T1 + (best_T1 - best_T1.detach())
    return gates_T1, index_T1, torch.ones_like(index_T1, dtype=torch.bool)


def limit_capacity(
    gates_TK: Tensor,
    expert_index_TK: Tensor,
    *,
    num_experts: int,
    capacity: int,
    starts_T: Tensor,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Gates (T, K) with 0 wherever an expert already served `capacity` tokens of the sequence.

    A row with `starts_T` (bool) True begins a sequence, which goes on to the next such row. Earlier
    tokens come first; a token asks an expert once. Padding (`mask_T` False) takes no place and
    keeps its gate. Source: the capacity of MixLoRA's switch variant, which counts padding too.
    """
    asked_TE = torch.zeros(
        *(len(gates_TK), num_experts), dtype=torch.int64, device=gates_TK.device
    ).scatter(1, expert_index_TK, 1)
    if mask_T is not None:
        asked_TE = asked_TE * mask_T[:, None]
    so_far_TE = asked_TE.cumsum(dim=0)
    row_T = torch.arange(len(gates_TK), device=gates_TK.device)
    first_T = torch.where(starts_T, row_T, 0).cummax(dim=0).values
    before_TE = (so_far_TE - asked_TE)[first_T]
    kept_TK = (so_far_TE - before_TE).gather(1, expert_index_TK) <= capacity
    return gates_TK * (kept_TK if mask_T is None else kept_TK | ~mask_T[:, None])


def _keep(
    sorted_TE: Tensor, index_TE: Tensor, chosen_TE: Tensor, *, renormalize: bool
) -> Selection:
    gates_TE = sorted_TE * chosen_TE
    if renormalize:
        gates_TE = _renormalized(gates_TE)
    return gates_TE, index_TE, chosen_TE


def _renormalized(gates_TK: Tensor) -> Tensor:
    # the floor only matters for sigmoid scores that have all underflowed: 0/0 would poison the
    # whole step
    return gates_TK / gates_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(gates_TK.dtype).tiny)

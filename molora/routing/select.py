"""Scores → (gates, expert_index, selected): which experts act on a row, and with what gate.

Every selector is a pure function of ``scores_TE`` (T rows, E experts) and returns three (T, K)
tensors: gates (differentiable in the scores unless said otherwise), expert indices (int64, distinct
in a row), and which slots are chosen (bool). A slot that is not chosen has gate 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

Selection = tuple[Tensor, Tensor, Tensor]
SelectFunction = Callable[[Tensor], Selection]


def dense(scores_TE: Tensor) -> Selection:
    """Every expert acts with its score; K = E."""
    num_rows, num_experts = scores_TE.shape
    expert_index = torch.arange(num_experts, device=scores_TE.device).expand(num_rows, num_experts)
    return scores_TE, expert_index, torch.ones_like(scores_TE, dtype=torch.bool)


def top_k(scores_TE: Tensor, k: int, *, renormalize: bool) -> Selection:
    """The k highest scores of each row, best first, divided by their sum if `renormalize`."""
    gates_TK, index_TK = torch.topk(scores_TE, k, dim=-1)
    if renormalize:
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


def unit_top1(scores_TE: Tensor) -> Selection:
    """The best expert with gate exactly 1, which carries no gradient."""
    index_T1 = scores_TE.argmax(dim=-1, keepdim=True)
    gates_T1 = torch.ones_like(index_T1, dtype=scores_TE.dtype)
    return gates_T1, index_T1, torch.ones_like(index_T1, dtype=torch.bool)


def limit_capacity(
    gates_TK: Tensor,
    expert_index_TK: Tensor,
    *,
    num_experts: int,
    capacity: int,
    num_sequences: int,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Gates (T, K) with 0 wherever an expert already served `capacity` tokens of the sequence.

    Rows are `num_sequences` sequences of equal length, in order. Earlier tokens come first, and
    within a token earlier slots. Padding (`mask_T` False) takes no place and keeps its gate.
    Source: the capacity of MixLoRA's switch variant, which counts padding too.
    """
    slots = gates_TK.shape[1]
    index_BN = rearrange(expert_index_TK, "(b s) k -> b (s k)", b=num_sequences)
    taken_BNE = torch.nn.functional.one_hot(index_BN, num_experts)
    if mask_T is not None:
        counted_BN = rearrange(
            mask_T[:, None].expand(-1, slots), "(b s) k -> b (s k)", b=num_sequences
        )
        taken_BNE = taken_BNE * counted_BN[..., None]
    place_BN = (taken_BNE.cumsum(dim=1) * taken_BNE).sum(dim=-1)
    kept_TK = rearrange(place_BN <= capacity, "b (s k) -> (b s) k", k=slots)
    return gates_TK * kept_TK


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

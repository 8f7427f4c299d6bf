"""Routing records made by hand, for tests of what reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.routing import Routing


def top_k_record(
    logits_TE: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    grid: tuple[int, ...] | None = None,
) -> Routing:
    """The record of softmax and renormalised top-k, written out with plain torch."""
    scores_TE = logits_TE.softmax(dim=-1)
    gates_TK, index_TK = scores_TE.topk(k, dim=-1)
    return Routing(
        logits=logits_TE,
        scores=scores_TE,
        gates=gates_TK / gates_TK.sum(dim=-1, keepdim=True),
        expert_index=index_TK,
        selected=torch.ones_like(index_TK, dtype=torch.bool),
        mask=mask,
        grid=grid or (logits_TE.shape[0],),
    )


def dense_record(
    logits_TE: Tensor, *, mask: Tensor | None = None, grid: tuple[int, ...] | None = None
) -> Routing:
    """The record of a dense softmax mixture."""
    scores_TE = logits_TE.softmax(dim=-1)
    return Routing(
        logits=logits_TE,
        scores=scores_TE,
        gates=scores_TE,
        expert_index=torch.arange(scores_TE.shape[1]).expand_as(scores_TE),
        selected=torch.ones_like(scores_TE, dtype=torch.bool),
        mask=mask,
        grid=grid or (logits_TE.shape[0],),
    )


def collapsed_logits(rows: int, num_experts: int, expert: int) -> Tensor:
    """Logits with which every row gives (to 1e-13) all its probability to one expert."""
    logits_TE = torch.zeros(rows, num_experts)
    logits_TE[:, expert] = 30.0
    return logits_TE

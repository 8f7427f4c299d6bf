"""The part of a decision that is about some of its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.routing.record import Routing


def dense(gates_TE: Tensor) -> Routing:
    """The decision that all experts act with these gates, which may be 0."""
    every_TE = torch.arange(gates_TE.shape[1], device=gates_TE.device).expand_as(gates_TE)
    chosen_TE = torch.ones_like(every_TE, dtype=torch.bool)
    return Routing(None, gates_TE, gates_TE, every_TE, chosen_TE, in_order=True)


def of_largest(gates_TE: Tensor, slots: int | None) -> Routing:
    """The decision with these gates, of which at most `slots` in a row are not 0."""
    if slots is None or slots >= gates_TE.shape[1]:
        return dense(gates_TE)
    index_TK = gates_TE.detach().abs().topk(slots, dim=-1).indices
    gates_TK = gates_TE.gather(1, index_TK)
    chosen_TK = torch.ones_like(index_TK, dtype=torch.bool)
    return Routing(None, gates_TE, gates_TK, index_TK, chosen_TK)


def grown(own_TE: Tensor, gates_TE: Tensor) -> Tensor:
    """Gates with the sum that those of all experts have; rows that have none of it stay."""
    kept_T1 = own_TE.sum(dim=-1, keepdim=True)
    some_T1 = kept_T1 != 0
    return own_TE * torch.where(
        some_T1, gates_TE.sum(dim=-1, keepdim=True) / torch.where(some_T1, kept_T1, 1), 1
    )

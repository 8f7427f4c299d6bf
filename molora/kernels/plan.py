"""Which rows go through which experts: rows sorted into groups, once per routing decision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Literal

import torch
from torch import Tensor

from molora.errors import BackendError

# Slots that a set must hold on average to be worth a copy of its experts' factors (one CPU thread,
# float32, D 512 and 1024, R 8: equal at 18 to 31 slots).
SLOTS_PER_SET = 32


@dataclass(frozen=True)
class RowPlan:
    """Rows sorted so that those of one group follow each other.

    By slot, a group is an expert (S = 1, N = T·K, G = E). By set, it is a set of K experts, and
    holds the rows that chose exactly these (S = K, N = T, G = C(E, K)). Where groups are single
    experts, group e is expert e.

    Attributes:
        order_N: the row of x at each sorted position, int64.
        offsets_G: where each group ends, int32; the last is N.
        members_GS: the experts of each group, ascending, int64.
        expert_NS: the members of each row's group, int64.
        slot_NS: in which slot k of its row each of these is, int64.
    """

    order_N: Tensor
    offsets_G: Tensor
    members_GS: Tensor
    expert_NS: Tensor
    slot_NS: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The attributes in order: what an autograd function saves."""
        return self.order_N, self.offsets_G, self.members_GS, self.expert_NS, self.slot_NS


def plan_rows(
    expert_index_TK: Tensor,
    num_experts: int,
    *,
    grouping: Literal["auto", "slot", "set"] = "auto",
) -> RowPlan:
    """Sort rows by expert or by set of experts, on the device and without waiting for it.

    Args:
        expert_index_TK: the experts of a row, distinct.
        num_experts: E.
        grouping: "auto" depends on shapes alone (see `by_set_is_cheaper`).

    Raises:
        BackendError: K > E, so that the experts of a row cannot be distinct.
    """
    num_rows, top_k = expert_index_TK.shape
    if top_k > num_experts:
        raise BackendError(
            f"expert_index has {top_k} slots a row for {num_experts} experts: the experts of a row "
            "are distinct. Pass at most one slot per expert."
        )
    if grouping == "auto":
        grouping = "set" if by_set_is_cheaper(num_rows, num_experts, top_k) else "slot"
    return (_by_set if grouping == "set" else _by_slot)(expert_index_TK, num_experts)


def by_set_is_cheaper(num_rows: int, num_experts: int, top_k: int) -> bool:
    """Whether sets of K experts are few enough beside T rows.

    A set's product is K·R wide where a slot's is R, and reads each row once instead of K times;
    its price is a copy of K experts' factors for each of the C(E, K) sets.
    """
    num_sets = comb(num_experts, top_k)
    return num_sets == 1 or num_sets * SLOTS_PER_SET <= num_rows * top_k


def all_experts(num_rows: int, num_experts: int, device: torch.device) -> RowPlan:
    """Every expert acts on every row: a single group."""
    index_TE = torch.arange(num_experts, device=device).expand(num_rows, -1)
    return _by_set(index_TE, num_experts)


def _by_slot(expert_index_TK: Tensor, num_experts: int) -> RowPlan:
    expert_N, position_N = expert_index_TK.flatten().sort(stable=True)
    members_G1 = torch.arange(num_experts, device=expert_N.device)[:, None]
    top_k = expert_index_TK.shape[1]
    return RowPlan(
        order_N=position_N // top_k,
        offsets_G=_ends(expert_N, num_experts),
        members_GS=members_G1,
        expert_NS=expert_N[:, None],
        slot_NS=(position_N % top_k)[:, None],
    )


def _by_set(expert_index_TK: Tensor, num_experts: int) -> RowPlan:
    """Sets are numbered by their combinadic, Σ_j C(e_j, j + 1) over the ascending experts e_j."""
    expert_TK, slot_TK = expert_index_TK.sort(dim=1)
    binomial_EK, members_GK = _sets(num_experts, expert_index_TK.shape[1], expert_TK.device)
    group_T = binomial_EK.gather(0, expert_TK).sum(dim=1)
    group_N, order_N = group_T.sort(stable=True)
    return RowPlan(
        order_N=order_N,
        offsets_G=_ends(group_N, len(members_GK)),
        members_GS=members_GK,
        expert_NS=expert_TK.index_select(0, order_N),
        slot_NS=slot_TK.index_select(0, order_N),
    )


def _ends(group_N: Tensor, num_groups: int) -> Tensor:
    groups_G = torch.arange(num_groups, device=group_N.device)
    return torch.searchsorted(group_N, groups_G, right=True, out_int32=True)


@lru_cache(maxsize=256)
def _sets(num_experts: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """C(e, j + 1) by expert and position, (E, K), and the members of every set, (G, K)."""
    table = [[comb(e, j + 1) for j in range(top_k)] for e in range(num_experts)]
    # ascending combinadic: compare the largest members first
    sets = sorted(combinations(range(num_experts), top_k), key=lambda members: members[::-1])
    # a cached inference tensor could not be saved for a later backward
    with torch.inference_mode(False):
        return torch.tensor(table, device=device), torch.tensor(sets, device=device)

"""Plans hold every slot of every row once, in groups of exactly the experts that were chosen."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest
import torch
from host_reads import HostReads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molora.errors import BackendError
from molora.kernels.plan import RowPlan, all_experts, plan_rows

GROUPINGS = ("slot", "set")
groupings = pytest.mark.parametrize("grouping", GROUPINGS)


def choices(T: int, E: int, K: int, seed: int = 0) -> Tensor:
    """(T, K) distinct experts, in any order."""
    source = torch.Generator().manual_seed(seed)
    return torch.rand(T, E, generator=source).argsort(dim=-1)[:, :K]


def check(plan: RowPlan, index_TK: Tensor, num_experts: int) -> None:
    """Every promise of `RowPlan`, read with loops."""
    T, K = index_TK.shape
    order, members = plan.order_N.tolist(), [tuple(group) for group in plan.members_GS.tolist()]
    places = [(order[n], k) for n, slots in enumerate(plan.slot_NS.tolist()) for k in slots]
    assert sorted(places) == list(product(range(T), range(K)))

    width = plan.members_GS.shape[1]
    assert width in (1, K)
    assert members == sorted(combinations(range(num_experts), width), key=lambda group: group[::-1])

    ends = [0, *plan.offsets_G.tolist()]
    assert plan.offsets_G.dtype == torch.int32
    assert len(ends) == len(members) + 1
    assert ends[-1] == len(order)
    for group, (start, end) in zip(members, pairwise(ends), strict=True):
        for n in range(start, end):
            slots = plan.slot_NS[n].tolist()
            assert tuple(index_TK[order[n], slots].tolist()) == group
            assert tuple(plan.expert_NS[n].tolist()) == group


@groupings
@given(data=st.data())
def test_every_slot_is_in_the_group_of_its_expert_once(grouping, data):
    E = data.draw(st.integers(1, 6))
    K = data.draw(st.integers(1, E))
    index_TK = choices(data.draw(st.integers(0, 12)), E, K, data.draw(st.integers(0, 2**31)))
    check(plan_rows(index_TK, E, grouping=grouping), index_TK, E)


def _first_takes_second(offsets_G: Tensor) -> Tensor:
    return torch.cat([offsets_G[1:2], offsets_G[1:]])


WRONG = {
    "rows_shifted": lambda plan: replace(plan, order_N=plan.order_N.roll(1)),
    "row_twice": lambda plan: replace(
        plan, order_N=plan.order_N[[0, *range(len(plan.order_N) - 1)]]
    ),
    "slots_swapped": lambda plan: replace(plan, slot_NS=1 - plan.slot_NS),
    "group_longer": lambda plan: replace(plan, offsets_G=_first_takes_second(plan.offsets_G)),
    "members_shifted": lambda plan: replace(plan, members_GS=plan.members_GS.roll(1, 0)),
    "experts_shifted": lambda plan: replace(plan, expert_NS=plan.expert_NS.roll(1, 0)),
}


@groupings
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_plan_is_found(grouping, wrong):
    index_TK = choices(20, 4, 2)
    plan = plan_rows(index_TK, 4, grouping=grouping)
    check(plan, index_TK, 4)
    with pytest.raises(AssertionError):
        check(WRONG[wrong](plan), index_TK, 4)


@groupings
def test_rows_of_a_group_keep_their_order(grouping):
    index_TK = choices(50, 3, 2).sort(dim=1).values
    plan = plan_rows(index_TK, 3, grouping=grouping)
    ends = [0, *plan.offsets_G.tolist()]
    for start, end in pairwise(ends):
        rows_N = plan.order_N[start:end]
        assert torch.equal(rows_N, rows_N.sort().values)


@pytest.mark.parametrize(
    ("T", "E", "K", "members"),
    [
        (1024, 8, 2, 2),
        (1024, 128, 2, 1),
        (64, 8, 2, 1),
        (1024, 8, 8, 8),
        (0, 8, 2, 1),
        (9, 1, 1, 1),
    ],
)
def test_auto_depends_on_shapes_alone(T, E, K, members):
    for index_TK in (choices(T, E, K), torch.arange(K).expand(T, K)):
        assert plan_rows(index_TK, E).members_GS.shape[1] == members


def test_all_experts_are_one_group_of_the_rows_as_they_come():
    plan = all_experts(5, 3, torch.device("cpu"))
    check(plan, torch.arange(3).expand(5, 3), 3)
    assert len(plan.offsets_G) == 1
    assert plan.order_N.tolist() == [0, 1, 2, 3, 4]


def test_more_slots_than_experts_are_refused():
    with pytest.raises(BackendError, match=r"3 slots a row for 2 experts.*at most one slot"):
        plan_rows(torch.zeros(4, 3, dtype=torch.int64), 2)


@groupings
def test_nothing_is_read_on_the_host(grouping):
    reads = HostReads()
    plan = reads.counting(plan_rows)(choices(20, 5, 2), 5, grouping=grouping)
    assert reads.reads == []
    reads.counting(lambda: plan.offsets_G.tolist())()
    assert reads.reads == ["tolist"]


def test_a_set_table_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        plan_rows(choices(5, 7, 4), 7, grouping="set")  # the first of this E and K
    plan = plan_rows(choices(5, 7, 4), 7, grouping="set")
    assert not plan.members_GS.is_inference()

"""Loads, gate mass and entropy against counts made by hand, with padding that changes nothing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_records import collapsed_logits, dense_record, top_k_record

from molora.routing import Routing, concatenate, statistics
from molora.routing.statistics import LoadStatistics

RECORD = Routing(
    logits=None,
    scores=torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0], [0.1, 0.8, 0.1]]),
    gates=torch.tensor([[0.75, 0.25], [0.6, 0.0], [1.0, 0.0], [0.8, 0.2]]),
    expert_index=torch.tensor([[0, 1], [2, 0], [0, 2], [1, 2]]),
    # row 1: the second slot was chosen and dropped by capacity; row 2: it was never chosen
    selected=torch.tensor([[True, True], [True, True], [True, False], [True, True]]),
    mask=torch.tensor([True, True, True, False]),
    grid=(2, 2),
)


def load_of(record: Routing) -> torch.Tensor:
    counted = LoadStatistics()
    counted.update({"site": [record]})
    return counted.loads()["site"]


def share_of_gates(record: Routing) -> torch.Tensor:
    mass = statistics.gate_mass(record)
    return mass / mass.sum()


def test_loads_count_slots_that_act_on_rows_that_count():
    assert statistics.expert_counts(RECORD).tolist() == [2, 1, 1]
    assert load_of(RECORD).tolist() == [0.5, 0.25, 0.25]
    unmasked = dataclasses.replace(RECORD, mask=None)
    assert statistics.expert_counts(unmasked).tolist() == [2, 2, 2]


def test_gate_mass_is_the_sum_of_the_gates_of_rows_that_count():
    torch.testing.assert_close(statistics.gate_mass(RECORD), torch.tensor([1.75, 0.25, 0.6]))


def test_entropy_is_the_mean_over_rows_that_count():
    by_hand = [
        -sum(p * math.log(p) for p in row if p > 0)
        for row in ([0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [1.0])
    ]
    assert statistics.entropy(RECORD).item() == pytest.approx(sum(by_hand) / 3, rel=1e-6)


@pytest.mark.parametrize("num_experts", [2, 5])
def test_values_at_uniform_and_at_collapsed_routing(num_experts):
    uniform = dense_record(torch.zeros(6, num_experts))
    even = torch.full((num_experts,), 1 / num_experts)
    torch.testing.assert_close(load_of(uniform), even)
    torch.testing.assert_close(share_of_gates(uniform), even)
    assert statistics.entropy(uniform).item() == pytest.approx(math.log(num_experts))

    collapsed = top_k_record(collapsed_logits(6, num_experts, expert=1), 1)
    alone = torch.zeros(num_experts)
    alone[1] = 1
    assert torch.equal(load_of(collapsed), alone)
    torch.testing.assert_close(share_of_gates(collapsed), alone)
    assert statistics.entropy(collapsed).item() == pytest.approx(0, abs=1e-6)


def test_entropy_of_sigmoid_scores_is_that_of_their_shares():
    scores_TE = torch.tensor([[0.3, 0.3, 0.3]])
    record = dataclasses.replace(dense_record(torch.zeros(1, 3)), scores=scores_TE)
    assert statistics.entropy(record).item() == pytest.approx(math.log(3))


@given(
    rows=st.integers(1, 6),
    padding=st.integers(1, 4),
    left=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_padding_changes_nothing(rows, padding, left, seed):
    source = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(rows, 4, generator=source)
    pad_TE = 50 * torch.randn(padding, 4, generator=source)
    parts = [(pad_TE, False), (logits_TE, True)] if left else [(logits_TE, True), (pad_TE, False)]
    mask = torch.cat([torch.full((len(part),), valid) for part, valid in parts])
    padded = top_k_record(torch.cat([part for part, _ in parts]), 2, mask=mask)
    alone = top_k_record(logits_TE, 2)
    for statistic in (load_of, statistics.gate_mass, statistics.entropy):
        torch.testing.assert_close(statistic(padded), statistic(alone))
    unmasked = dataclasses.replace(padded, mask=None)
    assert not torch.allclose(statistics.entropy(unmasked), statistics.entropy(alone), atol=1e-6)


def test_nothing_but_padding_gives_zeros():
    record = top_k_record(torch.randn(3, 4), 2, mask=torch.zeros(3, dtype=torch.bool))
    assert load_of(record).tolist() == [0.0] * 4
    assert statistics.gate_mass(record).tolist() == [0.0] * 4
    assert statistics.entropy(record).item() == 0


@pytest.mark.parametrize("gap", [1.0, 90.0, 200.0, 3000.0])
def test_entropy_has_a_finite_gradient_where_the_softmax_underflows(gap):
    logits_TE = torch.tensor([[0.0, gap, 0.0], [0.0, 1.0, 2.0]], requires_grad=True)
    statistics.entropy(dense_record(logits_TE)).backward()
    assert torch.isfinite(logits_TE.grad).all()
    assert logits_TE.grad[1].abs().max() > 0.01


def test_load_statistics_accumulate_over_forwards_like_one_pooled_record():
    first, second = (top_k_record(torch.randn(rows, 4), 2) for rows in (3, 8))
    other = top_k_record(torch.randn(5, 3, requires_grad=True), 1)
    running = LoadStatistics()
    running.update({"a": [first], "b": [other]})
    running.update({"a": [second, first]})

    loads = running.loads()

    torch.testing.assert_close(
        loads["a"], load_of(concatenate([first, second, first])), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(loads["b"], load_of(other))
    assert not loads["b"].requires_grad
    assert not torch.equal(loads["a"], load_of(first))
    assert LoadStatistics().loads() == {}

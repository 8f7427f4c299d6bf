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
from molora.routing.statistics import RoutingStatistics

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
    counted = RoutingStatistics()
    counted.update({"site": [record]})
    return counted.loads()["site"]


def sums_of(record: Routing) -> torch.Tensor:
    return statistics.row_sums([record])[0]


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
    for statistic in (load_of, statistics.gate_mass, statistics.entropy, sums_of):
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


def test_sums_over_rows_by_hand():
    found = statistics.Sums(sums_of(RECORD))
    assert found.counts.tolist() == [2, 1, 1]
    torch.testing.assert_close(found.mass.float(), torch.tensor([1.7, 0.45, 0.85]))
    assert found.rows == 3
    assert found.entropy.item() == pytest.approx(statistics.entropy(RECORD).item(), rel=1e-6)
    assert found.margin.item() == pytest.approx((0.25 + 0.4 + 1.0) / 3)


def test_mass_and_margin_of_sigmoid_scores_are_those_of_their_shares():
    scores_TE = torch.tensor([[0.9, 0.3, 0.3], [0.2, 0.2, 0.1]])
    record = dataclasses.replace(dense_record(torch.zeros(2, 3)), scores=scores_TE)
    found = statistics.Sums(sums_of(record))
    torch.testing.assert_close(found.mass.float(), torch.tensor([1.0, 0.6, 0.4]))
    assert found.margin.item() == pytest.approx((0.4 + 0.0) / 2)


def test_one_expert_alone_has_all_the_margin():
    found = statistics.Sums(sums_of(dense_record(torch.zeros(4, 1))))
    assert (found.margin, found.entropy, found.rows) == (1, 0, 4)


def test_statistics_accumulate_over_forwards_like_one_pooled_record():
    first, second = (top_k_record(torch.randn(rows, 4), 2) for rows in (3, 8))
    other = top_k_record(torch.randn(5, 3, requires_grad=True), 1)
    running = RoutingStatistics()
    running.update({"a": [first], "b": [other]})
    running.update({"a": [second, first]})

    pooled = concatenate([first, second, first])
    torch.testing.assert_close(running.sums()["a"], sums_of(pooled), rtol=1e-6, atol=0)
    assert torch.equal(running.sums()["b"], sums_of(other))
    assert torch.equal(running.loads()["a"], load_of(pooled))
    assert running.entropies()["a"].item() == pytest.approx(statistics.entropy(pooled).item())
    assert 0.05 < running.margins()["a"] < 0.95
    assert not running.sums()["b"].requires_grad
    assert not torch.equal(running.loads()["a"], load_of(first))
    assert RoutingStatistics().loads() == {}


@pytest.mark.parametrize("limit", [1, 50, 10**9])
def test_sites_are_summed_alike_whether_together_or_apart(limit, monkeypatch):
    monkeypatch.setattr(statistics, "STACKED_SCORES", limit)
    some = torch.tensor([True, True, False, True])
    masks = {3: [None, some], 5: [some, ~some], 7: [None, None]}
    records = {
        f"{experts}.{number}": [
            top_k_record(torch.randn(4, experts), 2, mask=masks[experts][number % 2])
        ]
        for experts in masks
        for number in range(4)
    }
    running = RoutingStatistics()
    running.update(records)
    found = running.sums()
    assert set(found) == set(records)
    for site, (record,) in records.items():
        torch.testing.assert_close(found[site], sums_of(record), rtol=1e-6, atol=0)
    assert not torch.equal(found["3.0"], found["3.2"])


def test_what_another_count_found_can_be_added():
    record, other = (top_k_record(torch.randn(6, 4), 2) for _ in range(2))
    whole, part, rest = (RoutingStatistics() for _ in range(3))
    whole.update({"a": [record, other], "b": [other]})
    part.update({"a": [record], "b": [other]})
    rest.update({"a": [other]})
    part.add(rest.sums())
    torch.testing.assert_close(part.sums(), whole.sums(), rtol=1e-12, atol=0)
    part.update({"b": [record]})
    assert part.sums()["b"][:4].sum() == 24


def test_rows_beyond_the_exact_range_of_float32_are_counted():
    one = RoutingStatistics()
    one.update({"a": [top_k_record(torch.randn(1, 2), 1)]})
    many = RoutingStatistics()
    many.add({"a": one.sums()["a"] * 2**24})
    many.add(one.sums())
    assert many.counts()["a"].sum() == 2**24 + 1

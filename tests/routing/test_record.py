"""The record itself: dense gates, detaching, pooling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from routing_records import dense_record, top_k_record

from molora.routing import Routing, concatenate


def test_dense_gates_put_every_gate_at_its_expert():
    record = Routing(
        logits=None,
        scores=torch.zeros(3, 4),
        gates=torch.tensor([[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]]),
        expert_index=torch.tensor([[2, 0], [1, 3], [3, 2]]),
        selected=torch.tensor([[True, True], [True, True], [True, False]]),
    )
    expected = torch.tensor([[0.3, 0, 0.7, 0], [0, 0.6, 0, 0.4], [0, 0, 0, 1.0]])
    assert torch.equal(record.dense_gates(), expected)
    assert record.num_experts == 4
    assert torch.equal(record.valid_rows(), torch.ones(3))


def test_dense_gates_of_a_dense_record_are_its_gates():
    record = dense_record(torch.randn(5, 3))
    assert torch.equal(record.dense_gates(), record.gates)


def test_dense_gates_carry_the_gradient_of_the_gates():
    logits_TE = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: top_k_record(x, 2).dense_gates(), logits_TE)


def test_detach_keeps_values_and_cuts_the_graph():
    mask = torch.tensor([True, False, True, True])
    record = top_k_record(torch.randn(4, 3, requires_grad=True), 2, mask=mask, grid=(2, 2))
    detached = record.detach()
    for field in dataclasses.fields(Routing):
        before, after = getattr(record, field.name), getattr(detached, field.name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after)
            assert not after.requires_grad
        else:
            assert before == after
    assert record.gates.requires_grad
    assert detached.grid == (2, 2)


def test_a_record_cannot_be_changed():
    record = dense_record(torch.randn(2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.gates = record.scores


def test_concatenate_pools_rows_and_keeps_the_graph():
    first = top_k_record(torch.randn(4, 3, requires_grad=True), 2, grid=(2, 2))
    mask = torch.tensor([True, False])
    second = top_k_record(torch.randn(2, 3), 2, mask=mask)

    pooled = concatenate([first, second])

    for name in ("logits", "scores", "gates", "expert_index", "selected"):
        pair = [getattr(first, name), getattr(second, name)]
        assert torch.equal(getattr(pooled, name), torch.cat(pair))
    assert pooled.mask.tolist() == [True] * 4 + [True, False]
    assert pooled.grid == (6,)
    assert pooled.gates.requires_grad
    assert concatenate([first]) is first


def test_concatenate_has_no_mask_or_logits_that_a_part_lacks():
    with_logits = dense_record(torch.randn(2, 3))
    without = dataclasses.replace(with_logits, logits=None)
    assert concatenate([with_logits, with_logits]).mask is None
    assert concatenate([with_logits, without]).logits is None


@pytest.mark.parametrize(
    "other",
    [dense_record(torch.zeros(2, 4)), top_k_record(torch.zeros(2, 3), 2)],
    ids=["experts", "slots"],
)
def test_concatenate_refuses_other_widths(other):
    with pytest.raises(ValueError, match=r"different \(experts, slots\) cannot be pooled"):
        concatenate([dense_record(torch.zeros(2, 3)), other])

"""Every auxiliary loss against its formula written with loops: value, gradient, padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_records import collapsed_logits, dense_record, top_k_record
from torch import Tensor

from molora.errors import ConfigError
from molora.losses import terms
from molora.routing import LinearRouter, Routing, concatenate

FORMS = ["normalized", "slots", "switch", "unscaled"]
TASK_TYPES = torch.tensor([1, 0, 1])
LABELS = torch.tensor([2, 0, 3])

TERMS: dict[str, Callable[[Routing], Tensor]] = {
    **{form: partial(terms.load_balance, form=form) for form in FORMS},
    "importance": terms.importance,
    "localized_balance": partial(terms.localized_balance, delta=0.2, task_types_B=TASK_TYPES),
    "log_balance": terms.log_balance,
    "router_z": terms.router_z,
    "routing_entropy": terms.routing_entropy,
    "task_cross_entropy": partial(terms.task_cross_entropy, expert_labels_B=LABELS),
}
BY_SEQUENCE = ("localized_balance", "task_cross_entropy")
all_terms = pytest.mark.parametrize("name", TERMS)


# ------------------------------------------------------------------ load balance


def fractions(probabilities: list[list[float]], k: int, form: str) -> list[float]:
    """f_e, counted: the share of the choices, or of the rows, that fell on each expert."""
    num_experts = len(probabilities[0])
    counts = [0] * num_experts
    for row in probabilities:
        best_first = sorted(range(num_experts), key=lambda e: -row[e])
        for expert in best_first[: 1 if form == "switch" else k]:
            counts[expert] += 1
    whole = sum(counts) if form == "normalized" else len(probabilities)
    return [count / whole for count in counts]


def balance(probabilities: list[list[float]], f_E: list[float], form: str) -> float:
    """Σ_e f_e P_e, times E unless unscaled."""
    rows, num_experts = len(probabilities), len(f_E)
    mean_E = [sum(row[e] for row in probabilities) / rows for e in range(num_experts)]
    product = sum(f * p for f, p in zip(f_E, mean_E, strict=True))
    return product if form == "unscaled" else num_experts * product


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_is_its_formula_with_a_mask(form, k):
    logits_TE = torch.randn(9, 4)
    mask = torch.tensor([True, False, True, True, True, False, True, True, False])
    valid = logits_TE[mask].softmax(dim=-1).tolist()
    expected = balance(valid, fractions(valid, k, form), form)
    record = top_k_record(logits_TE, k, mask=mask)
    assert terms.load_balance(record, form=form).item() == pytest.approx(expected, rel=1e-5)
    unmasked = terms.load_balance(replace(record, mask=None), form=form).item()
    assert unmasked != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_load_balance_is_that_with_the_fractions_held_constant(form):
    x_TD = torch.randn(12, 5, dtype=torch.float64)
    router = LinearRouter(torch.randn(4, 5, dtype=torch.float64))
    mask = torch.arange(12) != 3

    terms.load_balance(top_k_record(router(x_TD), 2, mask=mask), form=form).backward()
    found = router.weight.grad

    weight_ED = router.weight.detach()

    def probabilities(weight: Tensor) -> list[list[float]]:
        return (x_TD[mask] @ weight.T).softmax(dim=-1).tolist()

    constant_E = fractions(probabilities(weight_ED), 2, form)
    step, expected = 1e-6, torch.zeros_like(weight_ED)
    for e in range(4):
        for d in range(5):
            values = []
            for sign in (1, -1):
                moved = weight_ED.clone()
                moved[e, d] += sign * step
                values.append(balance(probabilities(moved), constant_E, form))
            expected[e, d] = (values[0] - values[1]) / (2 * step)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("form", "uniform", "collapsed"),
    # at k = 2 of 4: the value when all probabilities are equal, and when one expert has all
    [
        ("normalized", 1.0, 2.0),
        ("slots", 2.0, 4.0),
        ("switch", 1.0, 4.0),
        ("unscaled", 0.5, 1.0),
    ],
)
def test_load_balance_at_uniform_and_collapsed_routing(form, uniform, collapsed):
    flat = top_k_record(torch.zeros(6, 4), 2)
    assert terms.load_balance(flat, form=form).item() == pytest.approx(uniform, rel=1e-6)
    single = top_k_record(collapsed_logits(6, 4, expert=3), 2)
    assert terms.load_balance(single, form=form).item() == pytest.approx(collapsed, rel=1e-6)


@pytest.mark.parametrize("num_experts", [2, 5, 8])
def test_load_balance_is_1_when_uniform_and_the_number_of_experts_when_collapsed(num_experts):
    flat = top_k_record(torch.zeros(6, num_experts), 1)
    assert terms.load_balance(flat, form="normalized").item() == pytest.approx(1, rel=1e-6)
    single = top_k_record(collapsed_logits(6, num_experts, expert=1), 1)
    value = terms.load_balance(single, form="normalized").item()
    assert value == pytest.approx(num_experts, rel=1e-6)


def test_load_balance_can_be_below_its_value_at_uniform_routing():
    scores_TE = torch.tensor([[0.51, 0.49]] * 3 + [[0.0, 1.0]])
    record = replace(top_k_record(scores_TE.log(), 1), scores=scores_TE)
    # f = (3/4, 1/4), P = (1.53/4, 2.47/4)
    expected = 2 * (0.75 * 1.53 + 0.25 * 2.47) / 4
    assert terms.load_balance(record, form="normalized").item() == pytest.approx(expected)
    assert expected == pytest.approx(0.88, abs=0.005)


# ------------------------------------------------------------------ the others


def test_importance_is_the_squared_coefficient_of_variation_of_the_gates():
    record = top_k_record(torch.randn(7, 4), 2)
    mass_E = [0.0] * 4
    for gates, experts in zip(record.gates.tolist(), record.expert_index.tolist(), strict=True):
        for gate, expert in zip(gates, experts, strict=True):
            mass_E[expert] += gate
    mean = sum(mass_E) / 4
    expected = sum((mass - mean) ** 2 for mass in mass_E) / 4 / mean**2
    assert terms.importance(record).item() == pytest.approx(expected, rel=1e-5)
    assert terms.importance(dense_record(torch.zeros(7, 4))).item() == pytest.approx(0, abs=1e-9)
    # all on one of E: variance (E − 1)/E² over mean 1/E²
    single = top_k_record(collapsed_logits(7, 4, expert=0), 1)
    assert terms.importance(single).item() == pytest.approx(3, rel=1e-5)


def test_router_z_is_the_mean_squared_log_partition():
    logits_TE = torch.randn(7, 4)
    expected = sum(
        math.log(sum(math.exp(logit) for logit in row)) ** 2 for row in logits_TE.tolist()
    )
    assert terms.router_z(dense_record(logits_TE)).item() == pytest.approx(expected / 7, rel=1e-5)
    zero = terms.router_z(dense_record(torch.zeros(7, 4))).item()
    assert zero == pytest.approx(math.log(4) ** 2, rel=1e-6)


def test_routing_entropy_is_log_e_when_uniform_and_0_when_collapsed():
    assert terms.routing_entropy(dense_record(torch.zeros(7, 4))).item() == pytest.approx(
        math.log(4), rel=1e-6
    )
    single = terms.routing_entropy(dense_record(collapsed_logits(7, 4, expert=2)))
    assert single.item() == pytest.approx(0, abs=1e-6)


def test_log_balance_is_minus_the_log_of_the_product_of_mean_scores():
    logits_TE = torch.randn(7, 4)
    mask = torch.arange(7) != 2
    scores = logits_TE[mask].softmax(dim=-1).tolist()
    expected = -math.log(math.prod(sum(row[e] for row in scores) / 6 for e in range(4)))
    found = terms.log_balance(dense_record(logits_TE, mask=mask)).item()
    assert found == pytest.approx(expected, rel=1e-5)
    flat = terms.log_balance(dense_record(torch.zeros(7, 4))).item()
    assert flat == pytest.approx(4 * math.log(4), rel=1e-6)
    logits_TE[:, 1] = -torch.inf
    absent = terms.log_balance(dense_record(logits_TE)).item()
    rest = terms.log_balance(dense_record(logits_TE[:, [0, 2, 3]])).item()
    assert absent == pytest.approx(rest, rel=1e-5)


# ------------------------------------------------------------------ labels of experts


def cross_entropy_by_hand(logits: list[list[list[float]]], labels: list[int]) -> float:
    """Mean over the tokens of labelled sequences of log Σ exp − the label's logit."""
    values = [
        math.log(sum(math.exp(logit) for logit in row)) - row[label]
        for sequence, label in zip(logits, labels, strict=True)
        for row in sequence
        if label != -100
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize("labels", [[2, 0, 3], [1, -100, 3]])
def test_task_cross_entropy_is_its_formula_over_ragged_sequences(labels):
    logits_BSE = torch.randn(3, 5, 4, dtype=torch.float64)
    lengths = [5, 2, 4]
    mask_BS = torch.arange(5) < torch.tensor(lengths)[:, None]
    record = dense_record(logits_BSE.flatten(0, 1), mask=mask_BS.flatten(), grid=(3, 5))
    ragged = [logits_BSE[b, :length].tolist() for b, length in enumerate(lengths)]
    labels_B = torch.tensor(labels)
    value = terms.task_cross_entropy(record, expert_labels_B=labels_B).item()
    assert value == pytest.approx(cross_entropy_by_hand(ragged, labels), rel=1e-6)
    rolled = terms.task_cross_entropy(record, expert_labels_B=labels_B.roll(1)).item()
    assert value != pytest.approx(rolled, rel=1e-3)
    flat = replace(record, logits=torch.zeros(15, 4))
    found = terms.task_cross_entropy(flat, expert_labels_B=labels_B).item()
    assert found == pytest.approx(math.log(4))


def test_task_cross_entropy_of_packed_sequences_is_that_of_the_same_ones_apart():
    logits_NE = torch.randn(9, 4, dtype=torch.float64)
    segments = torch.tensor([1, 1, 2, 2, 2, 0, 3, 3, 0])
    record = replace(dense_record(logits_NE, mask=segments > 0), segment_ids=segments)
    apart = [logits_NE[segments == n].tolist() for n in (1, 2, 3)]
    value = terms.task_cross_entropy(record, expert_labels_B=LABELS).item()
    assert value == pytest.approx(cross_entropy_by_hand(apart, LABELS.tolist()), rel=1e-6)
    with pytest.raises(ConfigError, match="one value per sequence"):
        terms.task_cross_entropy(record, expert_labels_B=LABELS[:2])


def test_an_expert_that_cannot_be_chosen_is_no_label():
    logits_TE = torch.randn(6, 4, dtype=torch.float64)
    absent_TE = logits_TE.clone()
    absent_TE[:, 3] = -torch.inf
    leaf = absent_TE.requires_grad_()
    record = replace(dense_record(leaf), grid=(3, 2))
    value = terms.task_cross_entropy(record, expert_labels_B=LABELS)
    rows = [[row[:3] for row in logits_TE[2 * b : 2 * b + 2].tolist()] for b in range(3)]
    assert value.item() == pytest.approx(cross_entropy_by_hand(rows, [2, 0, -100]), rel=1e-6)
    value.backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[:4].abs().max() > 1e-3
    assert not leaf.grad[4:].any()
    nobody = terms.task_cross_entropy(record, expert_labels_B=torch.full((3,), -100))
    assert nobody.item() == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), "one value per sequence"),
        (torch.zeros(3, 1, dtype=torch.int64), "one value per sequence"),
        (torch.tensor([0, 4, 1]), "expert_labels has 4, but the experts are 0 to 3"),
        (torch.tensor([0, -1, 1]), "expert_labels has -1"),
    ],
)
def test_labels_that_are_of_no_expert_are_refused(labels, message):
    record = dense_record(torch.zeros(6, 4), grid=(3, 2))
    with pytest.raises(ConfigError, match=message):
        terms.task_cross_entropy(record, expert_labels_B=labels)


def test_gates_without_logits_have_no_cross_entropy():
    record = replace(dense_record(torch.zeros(6, 4), grid=(3, 2)), logits=None)
    with pytest.raises(ConfigError, match="do not come from logits"):
        terms.task_cross_entropy(record, expert_labels_B=LABELS)


# ------------------------------------------------------------------ LoRAMoE's constraint


def localized_by_hand(
    probabilities: list[list[list[float]]], types: list[int], delta: float
) -> float:
    """var(Z)/mean(Z)² over sequences × experts, from the authors' equations."""
    z = []
    for sequence, task_type in zip(probabilities, types, strict=True):
        num_experts = len(sequence[0])
        for e in range(num_experts):
            raised = (e < num_experts // 2) == (task_type == 1)
            z.append(sum(row[e] for row in sequence) * (1 + delta if raised else 1 - delta))
    mean = sum(z) / len(z)
    return sum((value - mean) ** 2 for value in z) / (len(z) - 1) / mean**2


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5])
def test_localized_balance_is_its_formula_over_ragged_sequences(delta):
    logits_BSE = torch.randn(3, 5, 4)
    lengths = [5, 2, 4]
    mask_BS = torch.arange(5) < torch.tensor(lengths)[:, None]
    record = dense_record(logits_BSE.flatten(0, 1), mask=mask_BS.flatten(), grid=(3, 5))
    scores = logits_BSE.softmax(dim=-1)
    ragged = [scores[b, :length].tolist() for b, length in enumerate(lengths)]

    value = terms.localized_balance(record, delta=delta, task_types_B=TASK_TYPES).item()

    assert value == pytest.approx(localized_by_hand(ragged, [1, 0, 1], delta), rel=1e-5)
    if delta:
        swapped = terms.localized_balance(record, delta=delta, task_types_B=1 - TASK_TYPES).item()
        assert value != pytest.approx(swapped, rel=1e-4)


@pytest.mark.parametrize(("batch", "num_experts"), [(1, 2), (2, 4), (5, 6)])
def test_localized_balance_of_flat_routing_is_delta_squared(batch, num_experts):
    record = dense_record(torch.zeros(batch * 3, num_experts), grid=(batch, 3))
    types, n = torch.arange(batch) % 2, batch * num_experts
    value = terms.localized_balance(record, delta=0.3, task_types_B=types).item()
    assert value == pytest.approx(0.3**2 * n / (n - 1), rel=1e-5)


def test_localized_balance_is_least_where_each_type_prefers_the_other_half():
    delta, types = 0.3, torch.tensor([1, 0])
    logits_TE = torch.randn(6, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits_TE], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        record = dense_record(logits_TE, grid=(2, 3))
        loss = terms.localized_balance(record, delta=delta, task_types_B=types)
        loss.backward()
        optimizer.step()

    assert loss.item() < 1e-6
    mass_BE = logits_TE.detach().softmax(dim=-1).view(2, 3, 4).sum(dim=1)
    first_B, second_B = mass_BE[:, :2].sum(dim=1), mass_BE[:, 2:].sum(dim=1)
    ratio = (1 + delta) / (1 - delta)
    assert (second_B[0] / first_B[0]).item() == pytest.approx(ratio, rel=0.01)
    assert (first_B[1] / second_B[1]).item() == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("types", [torch.zeros(2), torch.zeros(3, 1), torch.tensor(1)], ids=str)
def test_localized_balance_needs_one_type_per_sequence(types):
    record = dense_record(torch.zeros(6, 4), grid=(3, 2))
    with pytest.raises(ConfigError, match="one value per sequence"):
        terms.localized_balance(record, delta=0.1, task_types_B=types)


# ------------------------------------------------------------------ what holds for all of them


def padded_record(logits_BSE: Tensor, mask_BS: Tensor) -> Routing:
    return top_k_record(logits_BSE.flatten(0, 1), 2, mask=mask_BS.flatten(), grid=mask_BS.shape)


@all_terms
@given(left=st.booleans(), padding=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_padding_changes_neither_value_nor_gradient(name, left, padding, seed):
    source = torch.Generator().manual_seed(seed)
    logits_BSE = torch.randn(3, 4, 4, generator=source, dtype=torch.float64)
    mask_BS = torch.tensor([[True] * 4, [True, True, False, False], [False, True, True, True]])
    pad_BPE = 20 * torch.randn(3, padding, 4, generator=source, dtype=torch.float64)
    empty_BP = torch.zeros(3, padding, dtype=torch.bool)

    alone = logits_BSE.clone().requires_grad_()
    expected = TERMS[name](padded_record(alone, mask_BS))
    expected.backward()
    parts = [(pad_BPE, empty_BP), (logits_BSE, mask_BS)]
    parts = parts if left else parts[::-1]
    longer = torch.cat([logits for logits, _ in parts], dim=1).requires_grad_()
    value = TERMS[name](padded_record(longer, torch.cat([mask for _, mask in parts], dim=1)))
    value.backward()

    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    kept = slice(padding, None) if left else slice(0, 4)
    torch.testing.assert_close(longer.grad[:, kept], alone.grad, rtol=1e-5, atol=1e-9)
    dropped = slice(0, padding) if left else slice(4, None)
    assert not longer.grad[:, dropped].any()
    assert alone.grad[mask_BS].abs().max() > 1e-4
    assert not alone.grad[~mask_BS].any()


@all_terms
def test_without_the_mask_padding_does_change_the_value(name):
    logits_BSE = torch.randn(3, 6, 4)
    logits_BSE[:, 4:] = 20 * torch.randn(3, 2, 4)
    mask_BS = (torch.arange(6) < 4).expand(3, -1)
    record = padded_record(logits_BSE, mask_BS)
    value, unmasked = TERMS[name](record), TERMS[name](replace(record, mask=None))
    assert (value - unmasked).abs() > 1e-3
    everything = replace(record, mask=torch.ones(18, dtype=torch.bool))
    assert torch.equal(TERMS[name](everything), unmasked)


@all_terms
def test_a_batch_of_padding_alone_gives_a_finite_0_in_the_graph(name):
    logits_BSE = torch.randn(3, 2, 4, requires_grad=True)
    value = TERMS[name](padded_record(logits_BSE, torch.zeros(3, 2, dtype=torch.bool)))
    assert value.item() == 0
    assert value.requires_grad
    value.backward()
    assert torch.equal(logits_BSE.grad, torch.zeros_like(logits_BSE))


@all_terms
@pytest.mark.parametrize("scale", [1.0, 60.0, 1e4])
def test_gradient_is_finite_however_peaked_the_router(name, scale):
    logits_BSE = (scale * torch.randn(3, 2, 4)).requires_grad_()
    TERMS[name](padded_record(logits_BSE, torch.ones(3, 2, dtype=torch.bool))).backward()
    assert torch.isfinite(logits_BSE.grad).all()


@pytest.mark.parametrize("name", [t for t in TERMS if t not in BY_SEQUENCE])
def test_rows_of_several_calls_are_pooled_as_one(name):
    logits_TE = torch.randn(9, 4)
    parts = [top_k_record(part, 2) for part in logits_TE.split([2, 4, 3])]
    whole = TERMS[name](top_k_record(logits_TE, 2))
    torch.testing.assert_close(TERMS[name](concatenate(parts)), whole)
    assert (TERMS[name](parts[0]) - whole).abs() > 1e-4

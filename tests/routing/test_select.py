"""What holds for every selector, and what sets each apart, over random scores."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molora.routing import Routing, select
from molora.routing.select import SelectFunction

# name → (selector, whether the gates of a row sum to 1)
SELECTORS: dict[str, tuple[SelectFunction, bool]] = {
    "dense": (select.dense, False),
    "top_1": (partial(select.top_k, k=1, renormalize=False), False),
    "top_2": (partial(select.top_k, k=2, renormalize=False), False),
    "top_2_renormalized": (partial(select.top_k, k=2, renormalize=True), True),
    "top_p": (partial(select.top_p, p=0.7, renormalize=False), False),
    "top_p_renormalized": (partial(select.top_p, p=0.7, renormalize=True), True),
    "threshold": (partial(select.threshold, minimum=0.3, renormalize=False), False),
    "threshold_renormalized": (partial(select.threshold, minimum=0.3, renormalize=True), True),
    "unit_top1": (select.unit_top1, True),
}
selectors = pytest.mark.parametrize("name", SELECTORS)


@st.composite
def scores(draw: st.DrawFn, *, normalized: bool | None = None) -> Tensor:
    """(T, E) distinct scores in float64, softmax or sigmoid, from flat to peaked."""
    shape = draw(st.integers(0, 7)), draw(st.integers(2, 6))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 5.0]))
    logits_TE = sharpness * torch.randn(shape, generator=source, dtype=torch.float64)
    by_softmax = draw(st.booleans()) if normalized is None else normalized
    return logits_TE.softmax(dim=-1) if by_softmax else logits_TE.sigmoid()


def dense_gates(selection: select.Selection, num_experts: int) -> Tensor:
    gates_TK, index_TK, selected_TK = selection
    zeros_TE = torch.zeros(gates_TK.shape[0], num_experts, dtype=gates_TK.dtype)
    return Routing(None, zeros_TE, gates_TK, index_TK, selected_TK).dense_gates()


@selectors
@given(scores_TE=scores())
def test_gates_are_the_scores_of_distinct_chosen_experts(name, scores_TE):
    select_from, sums_to_one = SELECTORS[name]
    num_rows = scores_TE.shape[0]

    gates_TK, index_TK, selected_TK = select_from(scores_TE)

    assert gates_TK.shape == index_TK.shape == selected_TK.shape
    assert index_TK.dtype == torch.int64
    assert selected_TK.dtype == torch.bool
    assert all(len(set(row)) == len(row) for row in index_TK.tolist())
    assert (gates_TK >= 0).all()
    assert (gates_TK[~selected_TK] == 0).all()
    assert (gates_TK[selected_TK] > 0).all()
    assert selected_TK.any(dim=-1).all(), "every row needs an expert"
    if sums_to_one:
        torch.testing.assert_close(gates_TK.sum(-1), torch.ones(num_rows, dtype=torch.float64))
    if name != "unit_top1":  # gates are proportional to the scores, equal without renormalising
        chosen_TK = scores_TE.gather(1, index_TK) * selected_TK
        total_T1 = chosen_TK.sum(-1, keepdim=True) if sums_to_one else torch.ones(1)
        torch.testing.assert_close(gates_TK, chosen_TK / total_T1)


@selectors
@given(scores_TE=scores(), seed=st.integers(0, 1000))
def test_renaming_the_experts_renames_the_gates(name, scores_TE, seed):
    select_from, _ = SELECTORS[name]
    num_experts = scores_TE.shape[1]
    renamed = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))

    before_TE = dense_gates(select_from(scores_TE), num_experts)
    after_TE = dense_gates(select_from(scores_TE[:, renamed]), num_experts)

    torch.testing.assert_close(after_TE, before_TE[:, renamed], rtol=0, atol=1e-15)


@selectors
@given(scores_TE=scores())
def test_rows_are_decided_one_by_one(name, scores_TE):
    select_from, _ = SELECTORS[name]
    num_experts = scores_TE.shape[1]
    together_TE = dense_gates(select_from(scores_TE), num_experts)
    for row, alone_E in zip(scores_TE, together_TE, strict=True):
        assert torch.equal(dense_gates(select_from(row[None]), num_experts)[0], alone_E)


@given(scores_TE=scores(normalized=True))
def test_dense_is_top_k_of_all_experts(scores_TE):
    num_experts = scores_TE.shape[1]
    dense_TE = dense_gates(select.dense(scores_TE), num_experts)
    for renormalize in (False, True):  # softmax scores sum to 1 already
        all_of_them = select.top_k(scores_TE, num_experts, renormalize=renormalize)
        torch.testing.assert_close(dense_gates(all_of_them, num_experts), dense_TE)
    if len(scores_TE):
        fewer = select.top_k(scores_TE, num_experts - 1, renormalize=False)
        assert not torch.allclose(dense_gates(fewer, num_experts), dense_TE, atol=0)


@given(scores_TE=scores(), k=st.integers(1, 6))
def test_top_k_takes_the_k_best_in_order(scores_TE, k):
    k = min(k, scores_TE.shape[1])
    _, index_TK, _ = select.top_k(scores_TE, k, renormalize=False)
    assert index_TK.tolist() == [
        sorted(range(len(row)), key=lambda e, row=row: -row[e])[:k] for row in scores_TE.tolist()
    ]


@given(scores_TE=scores(), p=st.floats(0.05, 1.0))
def test_top_p_takes_the_fewest_best_experts_that_exceed_p(scores_TE, p):
    _, index_TE, selected_TE = select.top_p(scores_TE, p, renormalize=False)
    for scores_E, index_E, chosen_E in zip(scores_TE, index_TE, selected_TE, strict=True):
        chosen, left_out = index_E[chosen_E].tolist(), index_E[~chosen_E].tolist()
        mass = scores_E[chosen].sum().item()
        smallest = scores_E[chosen].min().item()
        assert not left_out or mass > p - 1e-12
        assert len(chosen) == 1 or mass - smallest <= p + 1e-12, "one fewer would do"
        assert all(scores_E[e] <= smallest for e in left_out)


@pytest.mark.parametrize(
    ("p", "expected"), [(0.3, 1), (0.5, 2), (0.6, 2), (0.75, 3), (0.8, 3), (1.0, 4)]
)
def test_top_p_includes_the_expert_that_crosses(p, expected):
    scores_TE = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
    _, _, selected_TE = select.top_p(scores_TE, p, renormalize=False)
    assert selected_TE.sum() == expected


@given(scores_TE=scores(), minimum=st.floats(0, 0.99))
def test_threshold_takes_what_exceeds_it_and_always_the_best(scores_TE, minimum):
    gates_TE = dense_gates(
        select.threshold(scores_TE, minimum, renormalize=False), scores_TE.shape[1]
    )
    for scores_E, gates_E in zip(scores_TE, gates_TE, strict=True):
        expected = [s > minimum or s == scores_E.max() for s in scores_E]
        assert (gates_E > 0).tolist() == expected


@selectors
def test_gradient_of_the_gates_is_the_derivative(name):
    select_from, _ = SELECTORS[name]
    scores_TE = torch.tensor(
        [[0.1, 0.58, 0.32], [0.35, 0.05, 0.6], [0.2, 0.45, 0.35]], dtype=torch.float64
    ).requires_grad_()
    if name == "unit_top1":  # constant by definition, and the config refuses it without a loss
        assert not select_from(scores_TE)[0].requires_grad
    else:
        assert torch.autograd.gradcheck(lambda s: dense_gates(select_from(s), 3), scores_TE)


def test_scores_that_all_underflow_give_finite_gates():
    scores_TE = torch.zeros(2, 3, requires_grad=True)
    for name, (select_from, _) in SELECTORS.items():
        gates_TK = select_from(scores_TE)[0]
        assert torch.isfinite(gates_TK).all(), name
        if gates_TK.requires_grad:
            (gradient,) = torch.autograd.grad(gates_TK.sum(), scores_TE)
            assert not gradient.isnan().any(), name


def served_by_hand(
    index_TK: Tensor, *, capacity: int, starts: list[int], mask_T: Tensor | None
) -> list[list[bool]]:
    """Which slots an expert serves, first come first served in each sequence."""
    kept = []
    for row, experts in enumerate(index_TK.tolist()):
        if row in starts:
            asked: Counter[int] = Counter()
        if mask_T is not None and not mask_T[row]:
            kept.append([True] * len(experts))  # padding takes no place and loses nothing
            continue
        asked.update(experts)
        kept.append([asked[e] <= capacity for e in experts])
    return kept


def starting_at(starts: list[int], length: int) -> Tensor:
    return torch.isin(torch.arange(length), torch.tensor(starts))


@given(data=st.data())
def test_capacity_is_first_come_first_served_in_each_sequence(data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    num_experts, capacity = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    slots = data.draw(st.integers(1, num_experts))
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scores_TE = torch.rand(sum(lengths), num_experts, generator=source)
    gates_TK, index_TK = scores_TE.topk(slots)
    masked = data.draw(st.booleans())
    mask_T = torch.rand(sum(lengths), generator=source) < 0.7 if masked else None

    limited_TK = select.limit_capacity(
        gates_TK,
        index_TK,
        num_experts=num_experts,
        capacity=capacity,
        starts_T=starting_at(starts, sum(lengths)),
        mask_T=mask_T,
    )

    kept = served_by_hand(index_TK, capacity=capacity, starts=starts, mask_T=mask_T)
    assert torch.equal(limited_TK, gates_TK * torch.tensor(kept))
    # never exceeded, counted in another way
    counted_TK = limited_TK > 0 if mask_T is None else (limited_TK > 0) & mask_T[:, None]
    for first, length in zip(starts, lengths, strict=True):
        rows = slice(first, first + length)
        served = Counter(index_TK[rows][counted_TK[rows]].tolist())
        assert all(count <= capacity for count in served.values())


def test_capacity_drops_the_later_token_and_padding_takes_no_place():
    gates_TK = torch.full((8, 1), 0.5)
    index_TK = torch.zeros(8, 1, dtype=torch.int64)
    limit = partial(select.limit_capacity, gates_TK, index_TK, num_experts=2, capacity=2)
    halves = starting_at([0, 4], 8)
    assert limit(starts_T=halves).flatten().bool().tolist() == [True, True, False, False] * 2
    # sequences of three, one and four tokens
    ragged = limit(starts_T=starting_at([0, 3, 4], 8))
    assert ragged.flatten().bool().tolist() == [True, True, False, True, True, True, False, False]
    mask_T = torch.tensor([False, True, True, True, True, True, False, True])
    # rows 0 and 6 are padding: they keep their gates, and the two after row 0 are served
    expected = [True, True, True, False, True, True, True, False]
    assert limit(starts_T=halves, mask_T=mask_T).flatten().bool().tolist() == expected


def test_capacity_of_no_rows_is_no_gates():
    # a base's own expert that no token was routed to
    gates_TK, index_TK = torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64)
    starts_T = torch.zeros(0, dtype=torch.bool)
    limited = select.limit_capacity(
        gates_TK, index_TK, num_experts=2, capacity=1, starts_T=starts_T
    )
    assert limited.shape == (0, 2)


def test_capacity_keeps_the_gradient_of_what_it_serves():
    gates_TK = torch.rand(4, 1, requires_grad=True)
    index_TK = torch.zeros(4, 1, dtype=torch.int64)
    select.limit_capacity(
        gates_TK, index_TK, num_experts=1, capacity=3, starts_T=starting_at([0], 4)
    ).sum().backward()
    assert gates_TK.grad.flatten().tolist() == [1.0, 1.0, 1.0, 0.0]

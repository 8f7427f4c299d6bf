"""Banks of imported experts: unlike blocks, absent experts, biases, DoRA's rows, the base below."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_problems import RUNNABLE
from torch import Tensor, nn

from molora.experts import Block, ExpertBank
from molora.kernels import Base, backend
from molora.routing import Routing

IN, OUT, EXPERTS = 6, 5, 7
COLUMNS = [5, 0, 2, 6, 1, 3]
"""Numbers of the bank's experts in decisions; the fifth of seven is absent."""
backends = pytest.mark.parametrize("name", RUNNABLE)


def blocks() -> list[Block]:
    """Ranks 3, 3, 3 with biases; 1 with rows of its own; 4, 4 with rows of their own."""
    source = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    def block(size: int, rank: int, *parts: str) -> Block:
        return Block(
            lora_A=normal(size, rank, IN),
            lora_B=normal(size, OUT, rank),
            scaling=normal(size).abs().float() + 0.5,
            trainable=False,
            bias=normal(size, OUT) if "bias" in parts else None,
            magnitude=normal(size, OUT).abs() if "rows" in parts else None,
            row_scale=normal(size, OUT).abs().float() if "rows" in parts else None,
        )

    return [block(3, 3, "bias"), block(1, 1, "rows"), block(2, 4, "rows")]


def by_hand(x_TD: Tensor, gates_TE: Tensor, weight_FD: Tensor, parts: list[Block]) -> Tensor:
    """Σ_e gate_e · ((c_e − 1) ∘ W x + c_e ∘ scaling_e · (B_e A_e x + bias_e))."""
    y_TF = torch.zeros(len(x_TD), OUT, dtype=x_TD.dtype)
    number = 0
    for part in parts:
        for e in range(len(part.lora_B)):
            update_TF = part.scaling[e].double() * (x_TD @ part.lora_A[e].T @ part.lora_B[e].T)
            if part.row_scale is not None:
                c_F = part.row_scale[e].double()
                update_TF = (c_F - 1) * (x_TD @ weight_FD.T) + c_F * update_TF
            if part.bias is not None:
                update_TF = update_TF + part.scaling[e].double() * part.bias[e]
            y_TF = y_TF + gates_TE[:, COLUMNS[number], None] * update_TF
            number += 1
    return y_TF


def decision(rows: int, k: int | None, *, seed: int = 2) -> tuple[Routing, Tensor]:
    """Of seven experts, and the logits that it comes from."""
    source = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(rows, EXPERTS, generator=source, dtype=torch.float64)
    logits_TE.requires_grad_()
    scores_TE = logits_TE.softmax(dim=-1)
    if k is None:
        index_TK = torch.arange(EXPERTS).expand(rows, EXPERTS)
        gates_TK = scores_TE
    else:
        gates_TK, index_TK = scores_TE.topk(k, dim=-1)
    chosen = torch.ones_like(index_TK, dtype=torch.bool)
    routing = Routing(logits_TE, scores_TE, gates_TK, index_TK, chosen, in_order=k is None)
    return routing, logits_TE


@backends
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("k", [None, 1, 2, 5])
@pytest.mark.parametrize("forms", ["plain", "all"])
def test_a_bank_of_unlike_blocks_is_the_sum_over_its_experts(
    name: str, rows: int, k: int | None, forms: str
) -> None:
    parts = blocks()
    if forms == "plain":
        parts = [replace(p, bias=None, magnitude=None, row_scale=None) for p in parts]
    x_TD = torch.randn(rows, IN, dtype=torch.float64, requires_grad=True)
    weight_FD = torch.randn(OUT, IN, dtype=torch.float64)
    routing, logits_TE = decision(rows, k)
    bank = ExpertBank(parts, backend=backend(name), columns=COLUMNS)
    assert bank.reads_product == (forms == "all")
    given: dict[str, Any] = {"product_TF": x_TD @ weight_FD.T} if bank.reads_product else {}

    found = bank(x_TD, routing, **given)
    expected = by_hand(x_TD, routing.dense_gates(), weight_FD, parts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wrong = replace(parts[-1], scaling=parts[-1].scaling * 1.01)
    other = by_hand(x_TD, routing.dense_gates(), weight_FD, [*parts[:-1], wrong])
    if rows > 1:
        assert not torch.allclose(other, expected, rtol=1e-5, atol=1e-5)

    weights_TF = torch.randn(rows, OUT, dtype=torch.float64)
    ours = torch.autograd.grad((found * weights_TF).sum(), [x_TD, logits_TE], retain_graph=True)
    theirs = torch.autograd.grad((expected * weights_TF).sum(), [x_TD, logits_TE])
    for value, reference in zip(ours, theirs, strict=True):
        assert rows == 1 or reference.abs().max() > 1e-3
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


@backends
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_with_the_base_its_product_is_added_once(name: str, transposed: bool, alone: bool) -> None:
    parts = [replace(p, magnitude=None, row_scale=None) for p in blocks()]
    parts = parts[:1] if alone else parts
    columns = COLUMNS[: 3 if alone else None]
    weight_FD = torch.randn(OUT, IN, dtype=torch.float64)
    bias_F = torch.randn(OUT, dtype=torch.float64)
    base = Base(
        nn.Parameter(weight_FD.T.contiguous() if transposed else weight_FD, requires_grad=False),
        nn.Parameter(bias_F, requires_grad=False),
        transposed,
    )
    routing, _ = decision(11, 2)
    x_TD = torch.randn(11, IN, dtype=torch.float64)
    bank = ExpertBank(parts, backend=backend(name), columns=columns)
    expected = x_TD @ weight_FD.T + bias_F
    expected = expected + by_hand(x_TD, routing.dense_gates(), weight_FD, parts)
    torch.testing.assert_close(bank(x_TD, routing, base=base), expected, rtol=1e-5, atol=1e-5)
    bank.dropout = 0.5  # evaluation drops nothing
    bank.eval()
    torch.testing.assert_close(bank(x_TD, routing, base=base), expected, rtol=1e-5, atol=1e-5)
    dropped = bank.train()(x_TD, routing, base=base)
    assert not torch.allclose(dropped, expected)


@backends
def test_without_a_decision_all_act_with_gate_1(name: str) -> None:
    parts = blocks()
    x_TD, weight_FD = torch.randn(9, IN).double(), torch.randn(OUT, IN).double()
    bank = ExpertBank(parts, backend=backend(name), columns=COLUMNS)
    found = bank(x_TD, None, product_TF=x_TD @ weight_FD.T)
    expected = by_hand(x_TD, torch.ones(9, EXPERTS), weight_FD, parts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@backends
def test_gates_that_grow_keep_the_sum_of_all(name: str) -> None:
    parts = [replace(p, bias=None, magnitude=None, row_scale=None) for p in blocks()][:2]
    columns = COLUMNS[:4]  # 5, 0, 2 and 6 of seven
    bank = ExpertBank(parts, backend=backend(name), columns=columns, grow_gates=True)
    x_TD, weight_FD = torch.randn(40, IN).double(), torch.zeros(OUT, IN).double()
    routing, logits_TE = decision(40, 2)
    gates_TE = routing.dense_gates()
    own_TE = torch.zeros_like(gates_TE)
    own_TE[:, columns] = gates_TE[:, columns]
    kept_T1 = own_TE.sum(dim=1, keepdim=True)
    assert (kept_T1 == 0).any()
    assert ((kept_T1 > 0) & (kept_T1 < gates_TE.sum(dim=1, keepdim=True))).any()
    grown_TE = torch.where(
        kept_T1 > 0, own_TE / kept_T1.clamp_min(1e-12) * gates_TE.sum(dim=1, keepdim=True), 0
    )
    expected = by_hand(x_TD, grown_TE, weight_FD, parts)
    found = bank(x_TD, routing)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, by_hand(x_TD, own_TE, weight_FD, parts), atol=1e-3)
    ours = torch.autograd.grad(found.pow(2).sum(), logits_TE, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected.pow(2).sum(), logits_TE)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert theirs.abs().max() > 1e-3


def test_frozen_parts_are_parameters_that_nobody_trains() -> None:
    bank = ExpertBank(blocks(), backend=backend("dense"), columns=COLUMNS)
    assert {
        *("lora_A", "lora_B", "bias", "1.lora_A", "1.lora_B"),
        *("1.magnitude", "2.lora_A", "2.lora_B", "2.magnitude"),
    } == {name for name, parameter in bank.named_parameters() if not parameter.requires_grad}
    assert len(list(bank.parameters())) == 9
    assert not list(bank.factors())
    assert {*bank.state_dict()} == {name for name, _ in bank.named_parameters()}

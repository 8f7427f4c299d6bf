"""A bank is the sum over its experts, in blocks of any rank, with its own dtype and dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_problems import RUNNABLE
from routing_records import dense_record, top_k_record
from torch import Tensor, nn

from molora.experts import Block, ExpertBank
from molora.kernels import BACKENDS, backend
from molora.routing import Routing

IN, OUT = 6, 5
backends = pytest.mark.parametrize("name", RUNNABLE)


def block(num_experts: int, rank: int, *, seed: int, trainable: bool = True) -> Block:
    source = torch.Generator().manual_seed(seed)
    return Block(
        lora_A=torch.randn(num_experts, rank, IN, generator=source),
        lora_B=torch.randn(num_experts, OUT, rank, generator=source),
        scaling=torch.rand(num_experts, generator=source) + 0.5,
        trainable=trainable,
    )


# five experts of ranks 3, 3, 1, 4, 4; the second block is frozen
def ragged() -> list[Block]:
    return [block(2, 3, seed=1), block(1, 1, seed=2, trainable=False), block(2, 4, seed=3)]


def by_hand(x_TD: Tensor, gates_TE: Tensor, blocks: list[Block]) -> Tensor:
    """Σ_e gate_e · scaling_e · B_e A_e x, expert by expert."""
    experts = [
        (b.lora_A[e], b.lora_B[e], b.scaling[e]) for b in blocks for e in range(len(b.lora_B))
    ]
    return sum(
        gates_TE[:, e, None] * scaling * (x_TD @ A.T @ B.T)
        for e, (A, B, scaling) in enumerate(experts)
    )


def routing(num_experts: int, k: int | None, rows: int = 9) -> Routing:
    logits_TE = torch.randn(rows, num_experts, generator=torch.Generator().manual_seed(5))
    return dense_record(logits_TE) if k is None else top_k_record(logits_TE, k)


@backends
@pytest.mark.parametrize("blocks", [[block(4, 3, seed=1)], ragged()], ids=["one_block", "ragged"])
@pytest.mark.parametrize("k", [None, 1, 2], ids=["dense", "top_1", "top_2"])
def test_delta_is_the_gated_sum_over_the_experts_of_all_blocks(name, blocks, k):
    bank = ExpertBank(blocks, backend=backend(name))
    decision, x_TD = routing(bank.num_experts, k), torch.randn(9, IN)
    expected = by_hand(x_TD, decision.dense_gates(), blocks)

    torch.testing.assert_close(bank(x_TD, decision), expected, rtol=1e-5, atol=1e-5)

    scaled = Block(blocks[0].lora_A, blocks[0].lora_B, blocks[0].scaling * 1.01)
    assert not torch.allclose(
        by_hand(x_TD, decision.dense_gates(), [scaled, *blocks[1:]]), expected, atol=1e-4
    )


@backends
@pytest.mark.parametrize("blocks", [[block(4, 3, seed=1)], ragged()], ids=["one_block", "ragged"])
def test_without_a_decision_all_experts_act_with_gate_1(name, blocks):
    bank = ExpertBank(blocks, backend=backend(name))
    x_TD = torch.randn(9, IN)
    expected = by_hand(x_TD, torch.ones(9, bank.num_experts), blocks)
    torch.testing.assert_close(bank(x_TD, None), expected, rtol=1e-5, atol=1e-5)


@backends
def test_gradients_reach_gates_input_and_trainable_blocks_only(name):
    blocks = ragged()
    bank = ExpertBank(blocks, backend=backend(name))
    logits_TE = torch.randn(9, 5, requires_grad=True)
    x_TD = torch.randn(9, IN, requires_grad=True)
    bank(x_TD, top_k_record(logits_TE, 2)).pow(2).sum().backward()
    found = [x_TD.grad, logits_TE.grad, bank.lora_A.grad, bank.get_parameter("2.lora_B").grad]
    assert bank.get_parameter("1.lora_A").grad is None

    leaves = [b.lora_A.clone().requires_grad_() for b in blocks]
    ups = [b.lora_B.clone().requires_grad_() for b in blocks]
    again = [Block(A, B, b.scaling) for A, B, b in zip(leaves, ups, blocks, strict=True)]
    x, logits = x_TD.detach().requires_grad_(), logits_TE.detach().requires_grad_()
    by_hand(x, top_k_record(logits, 2).dense_gates(), again).pow(2).sum().backward()
    for value, expected in zip(
        found, [x.grad, logits.grad, leaves[0].grad, ups[2].grad], strict=True
    ):
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@backends
def test_every_expert_gets_a_gradient_even_if_no_row_chose_it(name):
    bank = ExpertBank([block(4, 3, seed=1)], backend=backend(name))
    never_two = torch.zeros(9, 4)
    never_two[:, 2] = -50
    bank(torch.randn(9, IN), top_k_record(never_two + torch.rand(9, 4), 2)).sum().backward()
    assert bank.lora_A.grad[2].abs().max() == 0
    assert bank.lora_A.grad[0].abs().max() > 0


@backends
@pytest.mark.parametrize("shared_A", [False, True], ids=["own_A", "shared_A"])
def test_rows_are_the_ungated_updates_of_the_chosen_experts(name, shared_A):
    one = block(4, 3, seed=1)
    if shared_A:
        one = Block(one.lora_A[:1], one.lora_B, one.scaling)
    bank = ExpertBank([one], backend=backend(name))
    x_TD, index_TK = torch.randn(9, IN), routing(4, 2).expert_index
    expected = torch.stack(
        [
            torch.stack(
                [
                    one.scaling[e] * (one.lora_B[e] @ (one.lora_A[0 if shared_A else e] @ x_D))
                    for e in chosen
                ]
            )
            for x_D, chosen in zip(x_TD, index_TK.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(bank(x_TD, None, slots_TK=index_TK), expected, rtol=1e-5, atol=1e-5)


def test_state_holds_the_factors_under_their_names_and_nothing_else():
    bank = ExpertBank(ragged(), backend=backend("dense"))
    assert {key: tuple(value.shape) for key, value in bank.state_dict().items()} == {
        "lora_A": (2, 3, IN),
        "lora_B": (2, OUT, 3),
        "1.lora_A": (1, 1, IN),
        "1.lora_B": (1, OUT, 1),
        "2.lora_A": (2, 4, IN),
        "2.lora_B": (2, OUT, 4),
    }
    assert bank.num_experts == 5
    assert [name for name, p in bank.named_parameters() if not p.requires_grad] == [
        "1.lora_A",
        "1.lora_B",
    ]
    assert "num_experts=5, rank=3, 1, 4" in repr(bank)


# ------------------------------------------------------------------ dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_the_model_leaves_all_blocks_bit_for_bit(dtype):
    model = nn.Sequential(nn.Linear(IN, OUT), ExpertBank(ragged(), backend=backend("dense")))
    bank = model[1]
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    scaling = [b.scaling.clone() for b in bank.blocks()]

    model.to(dtype)

    assert model[0].weight.dtype == dtype
    for name, tensor in bank.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
    for b, value in zip(bank.blocks(), scaling, strict=True):
        assert torch.equal(b.scaling, value)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_products_run_in_the_dtype_of_the_input(name, dtype):
    bank = ExpertBank(ragged(), backend=backend(name))
    x_TD, decision = torch.randn(9, IN).to(dtype), routing(5, 2)
    delta_TF = bank(x_TD, decision)
    assert (
        delta_TF.dtype
        == bank(x_TD, None, slots_TK=torch.zeros(9, 1, dtype=torch.int64)).dtype
        == dtype
    )
    exact = by_hand(x_TD.float(), decision.dense_gates(), ragged())
    assert torch.norm(delta_TF.float() - exact) < 0.02 * torch.norm(exact)


@backends
def test_autocast_sets_the_dtype_of_the_products(name):
    bank = ExpertBank([block(4, 3, seed=1)], backend=backend(name))
    x_TD, decision = torch.randn(9, IN), routing(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_TF = bank(x_TD, decision)
        rows_TKF = bank(x_TD, None, slots_TK=decision.expert_index)
    assert low_TF.dtype == rows_TKF.dtype == torch.bfloat16
    low_TF.sum().backward()
    assert bank.lora_A.grad.dtype == torch.float32
    assert bank(x_TD, decision).dtype == torch.float32


# ------------------------------------------------------------------ dropout


def see_through(num_experts: int, **settings: object) -> ExpertBank:
    """A bank whose output is, expert by expert, what each of them was given."""
    up_EFR = torch.zeros(num_experts, num_experts * IN, IN)
    for e in range(num_experts):
        up_EFR[e, e * IN : (e + 1) * IN] = torch.eye(IN)
    identity = Block(torch.eye(IN).expand(num_experts, -1, -1), up_EFR, torch.ones(num_experts))
    return ExpertBank([identity], backend=backend("dense"), **settings)


@pytest.mark.parametrize("decided", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("mask", ["shared", "per_expert"])
def test_dropout_keeps_its_share_and_the_mean_by_one_mask_or_one_per_expert(mask, decided):
    rows, experts, p = 2000, 3, 0.25
    bank = see_through(experts, dropout=p, dropout_mask=mask).train()
    x_TD = torch.rand(rows, IN) + 1
    decision = dense_record(torch.zeros(rows, experts)) if decided else None
    gate = 1 / experts if decided else 1.0

    seen_TED = bank(x_TD, decision).view(rows, experts, IN).detach() / gate

    kept = seen_TED != 0
    torch.testing.assert_close(
        seen_TED[kept], (x_TD[:, None] / (1 - p)).expand_as(seen_TED)[kept], rtol=1e-5, atol=0
    )
    # 12000 draws: three standard deviations are 0.012
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.012)
    assert seen_TED.mean().item() == pytest.approx(x_TD.mean().item(), rel=0.02)
    agree = (kept[:, 0] == kept[:, 1]).float().mean().item()
    independent = p**2 + (1 - p) ** 2
    assert agree == pytest.approx(1.0 if mask == "shared" else independent, abs=0.02)

    seen_TED = bank.eval()(x_TD, decision).view(rows, experts, IN) / gate
    torch.testing.assert_close(seen_TED, x_TD[:, None].expand(-1, experts, -1))


def test_rows_drop_in_training_only():
    bank = see_through(3, dropout=0.25).train()
    x_TD, index_T1 = torch.rand(2000, IN) + 1, torch.full((2000, 1), 1)
    dropped = (bank(x_TD, None, slots_TK=index_T1)[:, 0, IN : 2 * IN] == 0).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.012)
    assert torch.equal(bank.eval()(x_TD, None, slots_TK=index_T1)[:, 0, IN : 2 * IN], x_TD)


@pytest.mark.parametrize("decided", [True, False], ids=["gated", "ungated"])
def test_a_mask_per_expert_reaches_every_block(decided):
    bank = ExpertBank(
        ragged(), backend=backend("dense"), dropout=0.5, dropout_mask="per_expert"
    ).train()
    x_TD, repeats = torch.randn(50, IN), 80

    def delta(rows_TD: Tensor) -> Tensor:
        return bank(rows_TD, dense_record(torch.zeros(len(rows_TD), 5)) if decided else None)

    mean_TF = delta(x_TD.repeat(repeats, 1)).view(repeats, 50, OUT).mean(dim=0)
    bank.eval()
    assert torch.norm(mean_TF - delta(x_TD)) < 0.25 * torch.norm(delta(x_TD))


# ------------------------------------------------------------------ compilation


def test_one_graph_serves_every_routing():
    bank = ExpertBank([block(4, 3, seed=1)], backend=backend("dense"))
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def run(x_TD: Tensor, gates_TK: Tensor, index_TK: Tensor) -> Tensor:
        scores_TE = torch.zeros(x_TD.shape[0], 4)
        return bank(x_TD, Routing(None, scores_TE, gates_TK, index_TK, gates_TK > 0))

    compiled = torch.compile(run, fullgraph=True, backend=count)
    for seed in (0, 1):
        logits_TE = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
        decision = top_k_record(logits_TE, 2)
        inputs = torch.randn(9, IN), decision.gates, decision.expert_index
        torch.testing.assert_close(compiled(*inputs), run(*inputs))
    assert len(graphs) == 1


def test_banks_that_share_a_decision_sort_its_rows_once():
    sorted_for: list[int] = []
    grouped = BACKENDS["grouped"]

    def plan(index_TK: Tensor, num_experts: int) -> object:
        sorted_for.append(num_experts)
        return grouped.plan(index_TK, num_experts)

    kernels = replace(grouped, plan=plan)
    banks = [ExpertBank([block(4, 3, seed=seed)], backend=kernels) for seed in (1, 2)]
    x_TD = torch.randn(9, IN)
    decision, other = routing(4, 2), top_k_record(torch.randn(9, 4), 2)
    for bank in banks:
        for each in (decision, other):
            own = Block(bank.lora_A, bank.lora_B, bank.scaling)
            expected = by_hand(x_TD, each.dense_gates(), [own])
            torch.testing.assert_close(bank(x_TD, each), expected, rtol=1e-5, atol=1e-5)
    assert sorted_for == [4, 4]

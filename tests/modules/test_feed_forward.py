"""The site at a whole FFN: gradients, the shared down projection, and what capacity drops."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molora.experts import Block, ExpertBank
from molora.kernels import backend
from molora.modules import ForwardContext, MoLoRAFeedForward, Projection, RoutingSite
from molora.routing import LinearRouter, scores, select

IN, WIDE, EXPERTS, RANK, TOKENS = 5, 8, 4, 3, 7
TOP_2 = partial(select.top_k, k=2, renormalize=True)
TOP_2_RAW = partial(select.top_k, k=2, renormalize=False)
TOP_1 = partial(select.top_k, k=1, renormalize=False)
Selector = Callable[[Tensor], select.Selection]


def projection(in_features: int, out_features: int, bias: bool, experts: bool) -> Projection:
    base = nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)
    block = Block(
        lora_A=torch.randn(EXPERTS, RANK, in_features, dtype=torch.float64),
        lora_B=torch.randn(EXPERTS, out_features, RANK, dtype=torch.float64),
        scaling=torch.tensor([0.5, 1.0, 1.5, 2.0]),
    )
    return Projection(base, ExpertBank([block], backend=backend("dense")) if experts else None)


def feed_forward(
    selector: Selector,
    *,
    bias: bool = False,
    down_experts: bool = True,
    capacity: int | None = None,
) -> MoLoRAFeedForward:
    """A gated FFN in float64, W_down (tanh(W_gate x) · W_up x) + b."""
    context = ForwardContext()
    site = RoutingSite(
        "ffn",
        LinearRouter(torch.randn(EXPERTS, IN, dtype=torch.float64)),
        score=scores.softmax,
        select=selector,
        capacity=capacity,
        stream="input",
        context=context,
    )
    return MoLoRAFeedForward(
        (projection(IN, WIDE, bias, True), projection(IN, WIDE, bias, True)),
        lambda gate, up: torch.tanh(gate) * up,
        projection(WIDE, IN, bias, down_experts),
        is_deterministic=lambda: True,
        finish=lambda y: y,
        site=site,
        context=context,
        base_forward=lambda x: x,
        overflow_input=capacity is not None,
    )


def naive(ffn: MoLoRAFeedForward, x_TD: Tensor, gates_TE: Tensor) -> Tensor:
    """Σ_e g_e FFN_e(x), where FFN_e has the weights W + scaling · B_e A_e everywhere."""

    def linear(p: Projection, e: int, x: Tensor) -> Tensor:
        weight = p.base.weight
        if p.experts is not None:
            bank = p.experts
            weight = weight + bank.scaling[e] * bank.lora_B[e] @ bank.lora_A[e]
        return nn.functional.linear(x, weight, p.base.bias)

    gate, up = ffn.inputs
    outputs = [
        linear(ffn.down, e, torch.tanh(linear(gate, e, x_TD)) * linear(up, e, x_TD))
        for e in range(EXPERTS)
    ]
    return sum(gates_TE[:, e : e + 1] * y for e, y in enumerate(outputs))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("down_experts", [True, False], ids=["down", "no_down"])
@pytest.mark.parametrize(
    "selector",
    [
        pytest.param(TOP_2, id="renormalized"),
        pytest.param(TOP_2_RAW, id="raw"),
        pytest.param(select.dense, id="dense"),
    ],
)
def test_one_down_projection_of_the_mix_equals_one_per_expert(
    selector: Selector, down_experts: bool, bias: bool
) -> None:
    """MixLoRA's identity Σ_e g_e W_down a_e = W_down (Σ_e g_e a_e), the bias included."""
    ffn = feed_forward(selector, bias=bias, down_experts=down_experts)
    x_TD = torch.randn(TOKENS, IN, dtype=torch.float64)
    rows: list[int] = []
    ffn.down.base.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    ffn.context.trace = {}
    y_TD = ffn.forward(x_TD)
    (routing,) = ffn.context.trace["ffn"]
    torch.testing.assert_close(y_TD, naive(ffn, x_TD, routing.dense_gates()))
    assert rows == [TOKENS]
    assert (y_TD - naive(ffn, x_TD, routing.dense_gates().roll(1, dims=1))).abs().max() > 1e-2


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    "selector",
    [
        pytest.param(TOP_2, id="top_k"),
        pytest.param(TOP_2_RAW, id="top_k_raw"),
        pytest.param(select.dense, id="dense"),
    ],
)
def test_gradient_equals_finite_differences(selector: Selector, bias: bool) -> None:
    ffn = feed_forward(selector, bias=bias)
    x_TD = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    banks = [p.experts for p in (*ffn.inputs, ffn.down) if p.experts is not None]
    inputs = (x_TD, ffn.site.router.weight, *(p for bank in banks for p in bank.parameters()))
    assert torch.autograd.gradcheck(lambda *_: ffn.forward(x_TD), inputs)


def test_a_token_that_capacity_dropped_gets_its_score_times_its_input() -> None:
    ffn = feed_forward(TOP_1, capacity=1)
    x_BSD = torch.randn(1, TOKENS, IN, dtype=torch.float64)
    ffn.context.trace = {}
    y_TD = ffn.forward(x_BSD).flatten(0, 1)
    (routing,) = ffn.context.trace["ffn"]
    served_T = routing.gates[:, 0] > 0
    assert 0 < served_T.sum() < TOKENS
    x_TD, top_T1 = x_BSD.flatten(0, 1), routing.scores.max(dim=-1, keepdim=True).values
    expected_TD = torch.where(
        served_T[:, None], naive(ffn, x_TD, routing.dense_gates()), top_T1 * x_TD
    )
    torch.testing.assert_close(y_TD, expected_TD)
    ffn.overflow_input = False
    ffn_zero_TD = ffn.forward(x_BSD).flatten(0, 1)
    assert torch.equal(ffn_zero_TD[~served_T], torch.zeros_like(ffn_zero_TD[~served_T]))


@pytest.mark.parametrize("mask", ["shared", "per_expert"])
def test_dropout_of_equal_experts_differs_only_with_a_mask_per_expert(mask: Any) -> None:
    block = Block(
        lora_A=torch.randn(1, RANK, IN).expand(EXPERTS, -1, -1).clone(),
        lora_B=torch.randn(1, WIDE, RANK).expand(EXPERTS, -1, -1).clone(),
        scaling=torch.ones(EXPERTS),
    )
    bank = ExpertBank([block], backend=backend("dense"), dropout=0.5, dropout_mask=mask)
    index_TK = torch.tensor([[0, 3], [2, 1]]).repeat(20, 1)
    x_TD = torch.randn(40, IN)
    delta_TKF = bank(x_TD, None, slots_TK=index_TK)
    assert delta_TKF.shape == (40, 2, WIDE)
    assert torch.equal(delta_TKF[:, 0], delta_TKF[:, 1]) == (mask == "shared")
    undropped_TF = x_TD @ block.lora_A[0].T @ block.lora_B[0].T
    assert not torch.allclose(delta_TKF[:, 0], undropped_TF)
    bank.eval()
    torch.testing.assert_close(bank(x_TD, None, slots_TK=index_TK)[:, 1], undropped_TF)

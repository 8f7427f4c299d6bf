"""One adapted linear: its value against a loop over experts, and its gradient against finite
differences."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from molora.experts import Block, ExpertBank
from molora.kernels import backend
from molora.modules import ForwardContext, MoLoRALinear, RoutingSite
from molora.routing import LinearRouter, scores, select

IN, OUT, EXPERTS, RANK, TOKENS = 6, 9, 4, 3, 7
SELECTORS = [
    pytest.param(select.dense, id="dense"),
    pytest.param(partial(select.top_k, k=2, renormalize=True), id="top_k"),
    pytest.param(partial(select.top_k, k=2, renormalize=False), id="top_k_raw"),
    pytest.param(partial(select.top_p, p=0.7, renormalize=False), id="top_p"),
]
Selector = Callable[[Tensor], select.Selection]


def adapted(selector: Selector | None, backend_name: str = "dense") -> MoLoRALinear:
    """A float64 linear with experts that all differ; `selector` None gives it no router."""
    base = nn.Linear(IN, OUT, dtype=torch.float64)
    block = Block(
        lora_A=torch.randn(EXPERTS, RANK, IN, dtype=torch.float64),
        lora_B=torch.randn(EXPERTS, OUT, RANK, dtype=torch.float64),
        scaling=torch.tensor([0.5, 1.0, 2.0, 3.0]),
    )
    context = ForwardContext()
    site = selector and RoutingSite(
        "linear",
        LinearRouter(torch.randn(EXPERTS, IN, dtype=torch.float64)),
        score=scores.softmax,
        select=selector,
        capacity=None,
        stream="input",
        context=context,
    )
    bank = ExpertBank([block], backend=backend(backend_name))
    return MoLoRALinear(base, base.forward, bank, decision=site, context=context, plain="linear")


def parameters(linear: MoLoRALinear) -> list[nn.Parameter]:
    router = [] if linear.decision is None else [linear.decision.router.weight]
    return [*linear.experts.parameters(), *router]


@pytest.mark.parametrize("selector", SELECTORS)
def test_value_is_the_base_plus_the_gated_loop_over_experts(selector: Selector) -> None:
    linear = adapted(selector)
    x_TD = torch.randn(TOKENS, IN, dtype=torch.float64)
    linear.context.trace = {}
    y_TF = linear.forward(x_TD)
    (routing,) = linear.context.trace["linear"]
    bank = linear.experts
    expected_TF = linear.base_forward(x_TD)
    for t in range(TOKENS):
        for gate, e in zip(routing.gates[t], routing.expert_index[t], strict=True):
            expected_TF[t] += gate * bank.scaling[e] * (bank.lora_B[e] @ bank.lora_A[e] @ x_TD[t])
    torch.testing.assert_close(y_TF, expected_TF)
    assert (
        len({tuple(row.tolist()) for row in routing.expert_index}) > 1 or selector is select.dense
    )
    assert (y_TF - linear.base_forward(x_TD)).abs().max() > 1e-2


@pytest.mark.parametrize("selector", [*SELECTORS, pytest.param(None, id="no_router")])
@pytest.mark.parametrize("backend_name", ["dense", "reference"])
def test_gradient_equals_finite_differences(selector: Selector | None, backend_name: str) -> None:
    linear = adapted(selector, backend_name)
    x_TD = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    # gradcheck changes these very tensors in place, so the forward need not take them
    assert torch.autograd.gradcheck(lambda *_: linear.forward(x_TD), (x_TD, *parameters(linear)))


def test_gradcheck_notices_a_router_that_is_cut_off() -> None:
    """Negative control of the test above: the same check fails when the gates lose their graph."""
    linear = adapted(lambda scores_TE: select.dense(scores_TE.detach()))
    x_TD = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda *_: linear.forward(x_TD), (x_TD, *parameters(linear)))


def test_disabled_it_is_the_base_to_the_bit() -> None:
    linear = adapted(select.dense)
    x_BSD = torch.randn(2, 5, IN, dtype=torch.float64)
    base_BSF = linear.base_forward(x_BSD)
    assert not torch.equal(linear.forward(x_BSD), base_BSF)
    linear.context.enabled = False
    assert torch.equal(linear.forward(x_BSD), base_BSF)

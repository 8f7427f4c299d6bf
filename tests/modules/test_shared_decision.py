"""A decision that the linears of one block share."""

import pytest
import torch
from torch import nn

from molora import AttachError
from molora.modules import ForwardContext, RoutingSite, SharedDecision
from molora.routing import LinearRouter, scores, select


class Block(nn.Module):
    """Calls whatever it is given with its own input."""

    def forward(self, hidden_states, call=None):  # type: ignore[no-untyped-def]
        return hidden_states if call is None else call(hidden_states)


@pytest.fixture
def shared() -> SharedDecision:
    site = RoutingSite(
        "block",
        LinearRouter(torch.randn(3, 6)),
        score=scores.softmax,
        select=select.dense,
        capacity=None,
        stream="input",
        context=ForwardContext(),
    )
    return SharedDecision(site, in_features=6, num_experts=3)


@pytest.fixture
def block(shared: SharedDecision) -> Block:
    module = Block()
    module.register_forward_pre_hook(shared.before, with_kwargs=True)
    module.register_forward_hook(shared.after, always_call=True)
    return module


def test_all_linears_of_a_call_get_one_decision(shared: SharedDecision, block: Block) -> None:
    x_BSD = torch.randn(2, 4, 6)
    first, second = block(x_BSD, lambda x: (shared.decide(x), shared.decide(x[..., :2])))
    assert first is second
    assert torch.equal(first.logits, (x_BSD.flatten(0, 1) @ shared.site.router.weight.T))
    # another call, given by name, decides anew
    other = block(hidden_states=-x_BSD, call=shared.decide)
    assert torch.equal(other.logits, -first.logits)


def test_the_decision_ends_with_the_call_even_if_that_raises(
    shared: SharedDecision, block: Block
) -> None:
    def fail(x: torch.Tensor) -> None:
        shared.decide(x)
        raise RuntimeError("in the block")

    x_BSD = torch.randn(2, 4, 6)
    with pytest.raises(RuntimeError, match="in the block"):
        block(x_BSD, fail)
    with pytest.raises(AttachError, match=r"called outside of it.*Use scope='linear'"):
        shared.decide(x_BSD)


def test_rows_that_are_not_the_blocks_are_refused(shared: SharedDecision, block: Block) -> None:
    with pytest.raises(AttachError, match=r"rows of shape \(2, 3\) that are not the block's"):
        block(torch.randn(2, 4, 6), lambda x: shared.decide(x[:, :3]))


@pytest.mark.parametrize("x", [torch.zeros(2, 4, 5), None], ids=["other_width", "nothing"])
def test_an_input_that_the_router_cannot_read_is_refused(
    block: Block, x: torch.Tensor | None
) -> None:
    with pytest.raises(AttachError, match=r"reads the block's hidden states with 6 features"):
        block(x)


def test_disabled_nothing_is_decided(shared: SharedDecision, block: Block) -> None:
    shared.site.context.enabled = False
    block(torch.zeros(2, 4, 5))
    assert shared.site.context.decisions == {}

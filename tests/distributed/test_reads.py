"""Parameters are read only inside a call of their own module, as ZeRO-3 needs: it gathers them
before the call and lets go of them after it. One process, whose hooks do the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed_scenarios import SCENARIOS, adapted, batches, seeded
from torch import Tensor, nn

from molora.experts import Block, ExpertBank
from molora.kernels import backend
from molora.routing import Routing


@contextlib.contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Inside, parameters carry the mark of DeepSpeed's, for which products are not shared."""
    for number, p in enumerate(model.parameters()):
        p.ds_id = number
    try:
        yield
    finally:
        for p in model.parameters():
            del p.ds_id


@contextlib.contextmanager
def partitioned(model: nn.Module) -> Iterator[None]:
    """Inside, a parameter has the shape (0,) unless its module is being called."""
    whole = {id(p): p.data for p in model.parameters()}
    depth = dict.fromkeys(whole, 0)

    def enter(module: nn.Module, *args: Any) -> None:
        for p in module.parameters(recurse=False):
            depth[id(p)] += 1
            p.data = whole[id(p)]

    def leave(module: nn.Module, *args: Any) -> None:
        for p in module.parameters(recurse=False):
            depth[id(p)] -= 1
            if depth[id(p)] == 0:
                p.data = torch.empty(0, dtype=p.dtype)

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    for p in model.parameters():
        p.data = torch.empty(0, dtype=p.dtype)
    try:
        yield
        assert all(p.shape == (0,) for p in model.parameters())
    finally:
        for handle in handles:
            handle.remove()
        for p in model.parameters():
            p.data = whole[id(p)]


@pytest.mark.parametrize("name", SCENARIOS)
@torch.no_grad()
def test_a_forward_reads_parameters_only_in_their_own_module(name: str) -> None:
    scenario = SCENARIOS[name]
    mixture = adapted(scenario)
    model = mixture.model
    batch = batches(scenario, model)[0]
    with marked(model):
        with seeded(0):
            expected: Tensor = model(**batch).logits
        with partitioned(model), seeded(0):
            found = model(**batch).logits
            shown = repr(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert "num_experts=" in shown


def test_a_bank_of_several_blocks_does_too() -> None:
    sizes, width, out = (2, 3), 5, 7
    blocks = [
        Block(torch.randn(e, 2 + e, width), torch.randn(e, out, 2 + e), torch.ones(e))
        for e in sizes
    ]
    bank = ExpertBank(blocks, backend=backend("auto"))
    x, scores = torch.randn(4, width), torch.rand(4, 5)
    gates, index = scores.topk(2)
    routing = Routing(None, scores, gates, index, torch.ones_like(index, dtype=torch.bool))
    with torch.no_grad():
        expected, dense = bank(x, routing), bank(x, None)
        with partitioned(bank):
            assert bank.num_experts == 5
            assert torch.equal(bank(x, routing), expected)
            assert torch.equal(bank(x, None), dense)
    assert not torch.allclose(expected, dense)


def test_a_parameter_read_elsewhere_is_found_out() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.child.weight

    reader = Reader()
    with pytest.raises(RuntimeError, match=r"size mismatch|must match"), partitioned(reader):
        reader(torch.randn(2, 3))

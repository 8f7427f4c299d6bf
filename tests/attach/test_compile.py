"""A whole adapted model compiles into one graph, which another routing does not change; B-37."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import molora

PRESETS = {
    "lora": {},
    "molora": {"num_experts": 4},
    "mola": {"num_experts": 4, "top_k": 2},
    "mixlora": {"num_experts": 4, "top_k": 2},
}


SLOW = [("mola", False), *((preset, True) for preset in PRESETS if preset != "mola")]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    gc.collect()


def adapted(preset: str) -> tuple[nn.Module, molora.Mixture]:
    model = tiny("llama", num_hidden_layers=1)
    config = getattr(molora.presets, preset)(rank=3, dropout=0.0, **PRESETS[preset])
    mixture = molora.attach(model, config, seed=0)
    source = torch.Generator().manual_seed(1)
    for bank in mixture.built.banks.values():
        bank.lora_B.data = torch.randn(bank.lora_B.shape, generator=source) / 3
    return model, mixture


def batch(seed: int, length: int = 9) -> dict[str, Any]:
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (2, length), generator=source)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}


def step(run: Any, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    out = run(**inputs)
    found = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    if model.training:
        out.loss.backward()
        found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return found


def choices(model: nn.Module, mixture: molora.Mixture, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad(), mixture.record() as records:
        model(**inputs)
    return [routing.expert_index for routing in records.values()]


@pytest.mark.parametrize(
    ("preset", "training"),
    [
        ("mola", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_a_model_is_one_graph_for_every_routing(preset: str, training: bool) -> None:
    torch._dynamo.reset()
    model, mixture = adapted(preset)
    model.train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(training):
        step(compiled, model, batch(0))
        graphs = counter.frame_count
        for seed in (1, 2):
            found = step(compiled, model, batch(seed))
            expected = step(model, model, batch(seed))
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
        assert counter.frame_count == graphs
        step(compiled, model, batch(3, length=11))
        assert counter.frame_count > graphs, "else this counts nothing"
    if preset not in ("lora", "molora"):
        first, second = (choices(model, mixture, batch(seed)) for seed in (1, 2))
        assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))

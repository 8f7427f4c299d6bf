"""A composed model compiles into one graph, which another routing does not change."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import load_set
from tiny_models import batch_for, tiny
from torch._dynamo.testing import CompileCounterWithBackend

import molora

SET: dict[str, dict[str, Any]] = {
    "math": {"target_modules": ["q_proj", "down_proj"]},
    "code": {"r": 5, "target_modules": ["q_proj", "up_proj"]},
    "law": {"target_modules": ["q_proj"], "use_dora": True},
    "art": {"target_modules": ["down_proj"], "lora_bias": True},
}
slow = pytest.mark.slow
CASES: list[Any] = [
    pytest.param({"router": "arrow"}, False, id="arrow"),
    pytest.param({"router": "linear", "new": ["more"]}, True, id="growing", marks=slow),
    pytest.param({"router": "spectr"}, False, id="spectr", marks=slow),
    pytest.param({"router": {"kind": "lag", "preselect": 2}}, False, id="lag", marks=slow),
    pytest.param({"router": "lora_flow"}, True, id="lora_flow", marks=slow),
    pytest.param({"router": "uniform"}, False, id="uniform", marks=slow),
]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    gc.collect()


@pytest.mark.parametrize(("options", "training"), CASES)
def test_a_composed_model_is_one_graph_for_every_routing(
    tmp_path: Path, options: dict[str, Any], training: bool
) -> None:
    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=1)
    first = {"layers_to_transform": [0], "layers_pattern": "layers"}
    settings = {name: {**given, **first} for name, given in SET.items()}
    mixture = molora.compose(model, load_set(tmp_path, settings), backend="dense", **options)
    model.train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def step(run: Any, seed: int) -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = run(**batch_for(model, (9, 9), seed=seed), use_cache=False)
        found = {"loss": out.loss.detach(), "logits": out.logits.detach()}
        if training:
            out.loss.backward()
            named = mixture.named_parameters()
            found |= {n: p.grad.clone() for n, p in named if p.grad is not None}
        return found

    with torch.set_grad_enabled(training):
        step(compiled, 0)
        graphs = counter.frame_count
        for seed in (1, 2):
            found, expected = step(compiled, seed), step(model, seed)
            assert found.keys() == expected.keys()
            assert len(found) > 2 or not training
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
        assert counter.frame_count == graphs

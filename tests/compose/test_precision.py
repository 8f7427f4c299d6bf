"""Composed mixtures in low precision: the base's types outside, float32 decisions, near values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import load_set, logits
from kernel_problems import RUNNABLE
from tiny_models import batch_for, tiny

import molora

SET: dict[str, Any] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "bias": {"lora_bias": True, "r": 5, "target_modules": ["q_proj", "down_proj"]},
}
autocast = partial(torch.autocast, "cpu", torch.bfloat16)
PRECISIONS: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[Any]]]] = {
    "bfloat16": (torch.bfloat16, nullcontext),
    "float16": (torch.float16, nullcontext),
    "autocast": (torch.float32, autocast),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("router", ["uniform", "arrow", "spectr", "lag", "linear", "mole"])
def test_types_and_values(tmp_path: Path, precision: str, router: str) -> None:
    dtype, context = PRECISIONS[precision]
    settings = {n: s for n, s in SET.items() if n != "dora" or router != "mole"}
    given: Any = {"kind": "lag", "preselect": 2} if router == "lag" else router
    experts = load_set(tmp_path, settings)
    exact = tiny("llama")
    molora.compose(exact, experts, router=given)
    model = tiny("llama").to(dtype)
    base = logits(tiny("llama"))
    mixture = molora.compose(model, experts, router=given)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for path in mixture.built.banks:
        linear = model.get_submodule(path)
        with torch.no_grad(), context():
            x = torch.randn(2, 3, linear.in_features, dtype=dtype)
            with mixture.disabled():
                plain = linear(x)
            seen.append((linear(x).dtype, plain.dtype))
    assert all(ours == theirs for ours, theirs in seen)
    with context(), mixture.record() as records:
        found = logits(model).float()
    assert {record.scores.dtype for record in records.values()} == {torch.float32}
    gap, effect = (found - logits(exact)).abs().mean(), (base - logits(exact)).abs().mean()
    # tokens whose best experts are almost equal may change them
    assert gap < 0.25 * effect


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "reference"])
def test_backends_agree_in_bfloat16_and_so_do_their_gradients(tmp_path: Path, backend: str) -> None:
    experts = load_set(tmp_path, SET)
    found = {}
    for name in ("reference", backend):
        model = tiny("llama").bfloat16()
        mixture = molora.compose(model, experts, router="linear", new=["more"], backend=name)
        out = model.train()(**batch_for(model))
        out.loss.backward()
        router = mixture.built.sites["model.layers.0.self_attn.q_proj"].router
        assert router.weight.dtype == torch.float32
        found[name] = out.logits.detach().float(), router.weight.grad
    for ours, theirs in zip(found[backend], found["reference"], strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
        assert theirs.norm() > 1e-3

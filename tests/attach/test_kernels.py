"""Which kernels an adapted model runs: those of its config, and what they do with the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_problems import RUNNABLE
from tiny_models import tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

import molora
from molora.attach.families import plain_linear
from molora.kernels import count_calls

IDS = torch.arange(40).view(2, 20)


def adapted(backend: str, preset: str = "mola", **options: Any) -> tuple[nn.Module, molora.Mixture]:
    options = {"num_experts": 4, "top_k": 2, "rank": 3, "losses": (), "dropout": 0.0, **options}
    config = getattr(molora.presets, preset)(**options, backend=backend)
    model = tiny("llama")
    mixture = molora.attach(model, config, seed=0)
    source = torch.Generator().manual_seed(1)
    for bank in mixture.built.banks.values():
        bank.lora_B.data = torch.randn(bank.lora_B.shape, generator=source) / 3
    return model.eval(), mixture


@torch.no_grad()
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_backend_of_the_config_runs_at_every_linear(name: str) -> None:
    model, mixture = adapted(name)
    expected, _ = adapted("reference")
    with count_calls() as calls:
        found = model(input_ids=IDS).logits
    assert calls == {("lora_mix", name): len(mixture.built.banks)}
    torch.testing.assert_close(found, expected(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
    mixture.built.banks["model.layers.0.mlp.up_proj"].lora_B.data *= 1.01
    assert not torch.allclose(model(input_ids=IDS).logits, found, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_backend_of_the_config_runs_at_whole_ffns(name: str) -> None:
    model, _ = adapted(name, "mixlora")
    with count_calls() as calls:
        model(input_ids=IDS)
    layers = model.config.num_hidden_layers
    # gate and up are rows; down and the four linears of the attention are mixed
    assert calls == {("lora_rows", name): 2 * layers, ("lora_mix", name): 5 * layers}


def test_auto_decodes_with_another_backend_than_it_trains_with() -> None:
    model, mixture = adapted("auto", rank=8, num_experts=64)
    ids = torch.arange(512).remainder(60)[None]
    linears = len(mixture.built.banks)
    with count_calls() as training:
        model(input_ids=ids)
    with count_calls() as decoding, torch.no_grad():
        model(input_ids=ids[:, :1])
    assert training == {("lora_mix", "grouped"): linears}
    assert decoding == {("lora_mix", "gather"): linears}


class Wrapped(nn.Linear):
    """What libraries make of a linear: a forward that is more than a product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def offloaded() -> nn.Linear:
    linear = nn.Linear(3, 4)
    own = linear.forward
    linear.forward = lambda x: own(x) * 2
    return linear


class Packed(torch.Tensor):
    """A weight that is stored otherwise."""


def packed() -> nn.Linear:
    linear = nn.Linear(3, 4)
    weight = linear.weight.detach().as_subclass(Packed)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(3, 4), "linear"),
        (Conv1D(4, 3), "conv1d"),
        (Wrapped(3, 4), None),
        (offloaded(), None),
        (packed(), None),
    ],
    ids=["linear", "conv1d", "subclass", "taken_over", "weight_of_another_kind"],
)
def test_the_product_is_the_kernels_only_for_plain_linears(
    module: nn.Module, kind: str | None
) -> None:
    assert plain_linear(module) == kind


@torch.no_grad()
def test_a_wrapped_linear_keeps_its_own_forward() -> None:
    outputs = []
    for wrap in (False, True):
        model = tiny("llama")
        attention = model.model.layers[0].self_attn
        if wrap:
            attention.o_proj.__class__ = Wrapped
        mixture = molora.attach(model, molora.presets.lora(rank=3, dropout=0.0), seed=0)
        x = torch.randn(2, attention.o_proj.in_features, generator=torch.Generator().manual_seed(0))
        with mixture.disabled():
            bare = attention.o_proj(x)
        assert torch.equal(attention.o_proj(x), bare)
        mixture.built.banks["model.layers.0.self_attn.o_proj"].lora_B.data += 0.1
        outputs.append((bare, attention.o_proj(x) - bare))
    (plain, update), (wrapped, same) = outputs
    assert torch.equal(wrapped, plain.relu())
    assert not torch.equal(wrapped, plain)
    torch.testing.assert_close(update, same, rtol=1e-4, atol=1e-5)


def test_a_gate_per_rank_is_an_expert_of_rank_1() -> None:
    """SMoRA's: the ranks of one LoRA are experts that share nothing."""
    x, A, B = torch.randn(7, 6), torch.randn(1, 5, 6), torch.randn(1, 4, 5)
    gates, index = torch.rand(7, 5).topk(3)
    scaling = torch.full((5,), 0.5)
    expected = torch.zeros(7, 4)
    for t in range(7):
        for gate, r in zip(gates[t], index[t].tolist(), strict=True):
            expected[t] += gate * 0.5 * B[0, :, r] * (A[0, r] @ x[t])
    factors = A.view(5, 1, 6), B[0].T[:, :, None], scaling
    for kernels in RUNNABLE.values():
        found = kernels.lora_mix(x, gates, index, *factors)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        other = kernels.lora_mix(x, gates, index.flip(1), *factors)
        assert not torch.allclose(other, expected, rtol=1e-4, atol=1e-5)

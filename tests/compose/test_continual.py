"""New and trained experts beside frozen ones: who gets gradients, who moves, and in which steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import PLAIN, RAGGED, load_set, logits
from kernel_problems import RUNNABLE
from tiny_models import batch_for, tiny
from torch import Tensor, nn

import molora
from molora.compose.experts import FrozenExperts

OURS = {"use_reentrant": False, "context_fn": molora.checkpoint_context}
EVERYWHERE = ["k_proj", "v_proj", "q_proj", "up_proj", "down_proj"]
GROWING: dict[str, Any] = {
    "router": "linear",
    "trainable": ["code"],
    "new": {"young": {"rank": 4, "alpha": 8.0}, "younger": {}},
}


def composed(
    tmp_path: Path, settings: Any = RAGGED, **options: Any
) -> tuple[nn.Module, molora.Mixture, FrozenExperts]:
    experts = load_set(tmp_path, settings)
    model = tiny("llama")
    return model, molora.compose(model, experts, **{**GROWING, **options}), experts


def parts(mixture: molora.Mixture, experts: FrozenExperts) -> dict[str, set[str]]:
    """Names of parameters: of frozen, of trained experts, of routers."""
    found: dict[str, set[str]] = {"frozen": set(), "trained": set(), "router": set()}
    for name, parameter in mixture.named_parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        found["router" if ".router." in name else kind].add(name)
    return found


def test_who_is_trained_and_how_much_that_is(tmp_path: Path) -> None:
    model, mixture, experts = composed(tmp_path)
    shapes = {p.path: (p.in_features, p.out_features) for p in mixture.plan.placements}
    expected = sum(
        m.rank * sum(shapes[path]) for path, m in experts.adapters["code"].modules.items()
    ) + sum((4 + 8) * sum(shape) for shape in shapes.values())
    routers = sum(6 * shape[0] for shape in shapes.values())
    assert mixture.num_parameters() == {"experts": expected, "router": routers}
    for bank in mixture.built.banks.values():
        for block in bank.blocks():
            for parameter in (block.lora_A, block.lora_B):
                # as ZeRO needs them: parameters, of which it asks no gradient
                assert isinstance(parameter, nn.Parameter)
                assert parameter.requires_grad == block.trainable
    groups = mixture.parameter_groups(1e-3, lora_plus_ratio=4.0)
    assert {group["name"]: group["lr"] for group in groups} == {
        "experts.A": 1e-3,
        "experts.B": 4e-3,
        "router": 1e-3,
    }
    assert sum(p.numel() for g in groups for p in g["params"]) == expected + routers
    own = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in groups for p in g["params"]} == own


@pytest.mark.parametrize("backend", RUNNABLE)
def test_frozen_experts_stay_bit_equal_while_others_learn(tmp_path: Path, backend: str) -> None:
    model, mixture, experts = composed(tmp_path, backend=backend)
    names = parts(mixture, experts)
    before = {name: p.detach().clone() for name, p in mixture.named_parameters()}
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n not in before}
    optimiser = torch.optim.AdamW(mixture.parameter_groups(3e-2, weight_decay=0.1))
    losses = []
    for _ in range(4):
        loss = model.train()(**batch_for(model)).loss
        loss.backward()
        for name, parameter in mixture.named_parameters():
            assert (parameter.grad is None) == (name in names["frozen"]), name
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, parameter in mixture.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in names["frozen"]), name
    assert names["frozen"]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_what_starts(tmp_path: Path) -> None:
    _, mixture, experts = composed(tmp_path)
    for path, bank in mixture.built.banks.items():
        blocks = list(bank.blocks())
        new = [b for b in blocks if b.trainable and not b.lora_B.any()]
        assert {block.rank for block in new} == {4, 8}
        assert {float(s) for block in new for s in block.scaling} == {2.0}
        assert all(block.lora_A.any() for block in new)
        if path in experts.adapters["code"].modules:
            own = experts.adapters["code"].modules[path]
            (block,) = (b for b in blocks if b.trainable and b.lora_B.any())
            assert torch.equal(block.lora_A[0], own.lora_A)
            assert torch.equal(block.lora_B[0], own.lora_B)
            assert block.scaling.tolist() == pytest.approx([own.scaling])
    again = composed(tmp_path / "again")[1].state_dict()
    other = composed(tmp_path / "other", seed=1)[1].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in mixture.state_dict().items())
    assert any(not torch.equal(t, other[name]) for name, t in mixture.state_dict().items())


def test_a_role_is_frozen_and_thawed_without_the_frozen_experts(tmp_path: Path) -> None:
    _, mixture, experts = composed(tmp_path)
    names = parts(mixture, experts)
    mixture.freeze("experts")
    assert not parts(mixture, experts)["trained"]
    mixture.freeze("experts", frozen=False)
    assert parts(mixture, experts) == names
    mixture.freeze("router")
    assert "router" not in {group["name"] for group in mixture.parameter_groups(1e-3)}


def test_a_trained_factor_is_of_the_mixtures_type(tmp_path: Path) -> None:
    _, mixture, _ = composed(tmp_path, dtype="bfloat16")
    for bank in mixture.built.banks.values():
        for block in bank.blocks():
            kind = torch.bfloat16 if block.trainable else torch.float32
            assert block.lora_A.dtype == block.lora_B.dtype == kind


def gradients(model: nn.Module, mixture: molora.Mixture) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(**batch_for(model, side="left")).loss.backward()
    return {n: p.grad.clone() for n, p in mixture.named_parameters() if p.grad is not None}


def learned(mixture: molora.Mixture) -> None:
    """New experts as they are after some steps."""
    source = torch.Generator().manual_seed(9)
    for bank in mixture.built.banks.values():
        for block in bank.blocks():
            if block.trainable:
                values = torch.randn(block.lora_B.shape, generator=source) * 0.2
                block.lora_B.data.copy_(values)


@pytest.mark.parametrize("router", ["linear", "lora_flow", "hard_top1", "mole"])
def test_activation_checkpointing_has_the_same_gradients(tmp_path: Path, router: str) -> None:
    model, mixture, _ = composed(tmp_path, router=router)
    model.double()
    learned(mixture)
    expected = gradients(model, mixture)
    model.gradient_checkpointing_enable(OURS)
    found = gradients(model, mixture)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "reference"])
@pytest.mark.parametrize("missing", ["mask", "renorm"])
def test_every_backend_has_the_same_gradients(tmp_path: Path, backend: str, missing: str) -> None:
    found = {}
    for name in ("reference", backend):
        model, mixture, _ = composed(tmp_path / name, backend=name, missing=missing)
        model.double()
        learned(mixture)
        found[name] = gradients(model, mixture)
    expected = found["reference"]
    assert found[backend].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[backend][name], value, atol=1e-6, rtol=1e-4)
    assert any(value.abs().max() > 1e-3 for n, value in expected.items() if "router" in n)


def test_an_expert_alone_learns_beside_none(tmp_path: Path) -> None:
    """One expert, trained on: no router, and only its own factors."""
    model, mixture, _ = composed(
        tmp_path, {"math": PLAIN["math"]}, router="linear", trainable=["math"], new=()
    )
    assert mixture.num_parameters()["router"] == 0
    before = logits(model)
    optimiser = torch.optim.SGD(mixture.parameter_groups(0.5))
    model.train()(**batch_for(model)).loss.backward()
    optimiser.step()
    assert (logits(model.eval()) - before).abs().max() > 1e-3

"""Routers made from experts or from vectors: each against its formula, written densely."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import RAGGED, by_hand, load_set, logits
from tiny_models import batch_for, tiny
from torch import Tensor

import molora
from molora.compose.experts import FrozenExperts

SETS = {"plain": {"a": {}, "b": {}, "c": {}, "d": {}}, "ragged": RAGGED}


def there(experts: FrozenExperts, path: str) -> list[int]:
    return [number for number, present in enumerate(experts.present(path)) if present]


def norms(experts: FrozenExperts, path: str, x: Tensor) -> Tensor:
    """(..., E): ‖scaling · B A x‖, with dense updates in float64; -inf of who is absent."""
    found = torch.full((*x.shape[:-1], len(experts.names)), -torch.inf, dtype=torch.float64)
    for number, adapter in enumerate(experts.adapters.values()):
        if path in adapter.modules:
            m = adapter.modules[path]
            update_FD = m.scaling * m.lora_B.double() @ m.lora_A.double()
            found[..., number] = (x.double() @ update_FD.T).norm(dim=-1)
    return found


def directions(experts: FrozenExperts, path: str, x: Tensor) -> Tensor:
    """(..., E): |x · v| with the first right-singular vector; -inf of who is absent."""
    found = torch.full((*x.shape[:-1], len(experts.names)), -torch.inf, dtype=torch.float64)
    for number, adapter in enumerate(experts.adapters.values()):
        if path in adapter.modules:
            m = adapter.modules[path]
            Vh = torch.linalg.svd(m.lora_B.double() @ m.lora_A.double())[2]
            found[..., number] = (x.double() @ Vh[0]).abs()
    return found


def softmax_of_best(values_E: Tensor, k: int) -> Tensor:
    best_EK = values_E.topk(k, dim=-1).indices
    kept_E = torch.full_like(values_E, -torch.inf).scatter(
        -1, best_EK, values_E.gather(-1, best_EK)
    )
    return kept_E.softmax(dim=-1)


def check(
    experts: FrozenExperts, router: Any, gates: Any, wrong: Any = None, **options: Any
) -> molora.Mixture:
    """The whole model with `router` is that with `gates`, and not that with `wrong`."""
    model = tiny("llama")
    mixture = molora.compose(model, experts, router=router, **options)
    found = logits(model)
    torch.testing.assert_close(found, by_hand(experts, gates), atol=5e-5, rtol=5e-5)
    if wrong is not None:
        assert (by_hand(experts, wrong) - found).abs().max() > 1e-3
    return mixture


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("relative", [False, True])
def test_spectr_goes_by_the_norms_of_the_updates(tmp_path: Path, kind: str, relative: bool) -> None:
    experts = load_set(tmp_path, SETS[kind])

    def gates(path: str, x: Tensor, relative: bool = relative) -> Tensor:
        norms_E = norms(experts, path, x)
        if relative:
            for number in there(experts, path):
                m = [*experts.adapters.values()][number].modules[path]
                norms_E[..., number] /= m.update_norm
        return softmax_of_best(norms_E / 0.5, min(2, 4))

    router = {"kind": "spectr", "top_k": 2, "temperature": 0.5, "relative": relative}
    mixture = check(experts, router, gates, lambda path, x: gates(path, x, not relative))
    for path, site in mixture.built.sites.items():
        x = torch.randn(9, site.router.in_features)
        found = site.decide(x).logits.double() * 0.5
        expected = norms(experts, path, x)
        if not relative:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("preselect", [1, 2, 3, 20])
def test_lag_is_spectr_among_those_that_arrow_prefers(
    tmp_path: Path, kind: str, preselect: int
) -> None:
    experts = load_set(tmp_path, SETS[kind])

    def gates(path: str, x: Tensor) -> Tensor:
        best_EK = directions(experts, path, x).topk(min(preselect, 4), dim=-1).indices
        norms_E = norms(experts, path, x)
        near_E = torch.full_like(norms_E, -torch.inf).scatter(
            -1, best_EK, norms_E.gather(-1, best_EK)
        )
        return softmax_of_best(near_E, 2)

    def spectr(path: str, x: Tensor) -> Tensor:
        return softmax_of_best(norms(experts, path, x), 2)

    router = {"kind": "lag", "preselect": preselect, "top_k": 2}
    check(experts, router, gates, spectr if preselect < 4 else None)


def vectors_for(experts: FrozenExperts) -> dict[str, dict[str, Tensor]]:
    source = torch.Generator().manual_seed(3)
    return {
        name: {
            path: torch.randn(m.lora_A.shape[1], generator=source) * 3 + 0.5
            for path, m in adapter.modules.items()
        }
        for name, adapter in experts.adapters.items()
    }


@pytest.mark.parametrize("renormalize", [True, False])
def test_phatgoose_compares_both_as_a_layer_norm_leaves_them(
    tmp_path: Path, renormalize: bool
) -> None:
    experts = load_set(tmp_path, RAGGED)
    vectors = vectors_for(experts)

    def norm(x: Tensor) -> Tensor:
        x = x.double()
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()

    def gates(path: str, x: Tensor, renormalize: bool = renormalize) -> Tensor:
        scores_E = torch.full((*x.shape[:-1], 4), -torch.inf, dtype=torch.float64)
        for number in there(experts, path):
            v = vectors[experts.names[number]][path]
            scores_E[..., number] = norm(x) @ norm(v) / math.sqrt(len(v))
        p_E = scores_E.softmax(dim=-1)
        index_EK = p_E.topk(2, dim=-1).indices
        kept_E = torch.zeros_like(p_E).scatter(-1, index_EK, p_E.gather(-1, index_EK))
        return kept_E / kept_E.sum(-1, keepdim=True) if renormalize else kept_E

    router = {"kind": "phatgoose", "vectors": vectors, "renormalize": renormalize}
    check(experts, router, gates, lambda path, x: gates(path, x, not renormalize))


def test_average_activation_is_a_product_with_the_direction_of_the_mean(tmp_path: Path) -> None:
    experts = load_set(tmp_path, RAGGED)
    vectors = vectors_for(experts)

    def gates(path: str, x: Tensor, temperature: float = 0.1) -> Tensor:
        scores_E = torch.full((*x.shape[:-1], 4), -torch.inf, dtype=torch.float64)
        for number in there(experts, path):
            v = vectors[experts.names[number]][path].double()
            scores_E[..., number] = x.double() @ v / v.norm() / math.sqrt(len(v)) / temperature
        return softmax_of_best(scores_E, 2)

    router = {"kind": "average_activation", "vectors": vectors, "temperature": 0.1}
    check(experts, router, gates, lambda path, x: gates(path, x, 0.2))


@pytest.mark.parametrize("start", ["arrow", "given"])
def test_a_learned_router_starts_from_vectors(tmp_path: Path, start: str) -> None:
    experts = load_set(tmp_path, RAGGED)
    vectors: Any = vectors_for(experts) if start == "given" else "arrow"
    model = tiny("llama")
    mixture = molora.compose(model, experts, router={"kind": "linear", "vectors": vectors})
    exact = molora.compose(tiny("llama"), experts, router="arrow")
    for path, site in mixture.built.sites.items():
        for number in range(4):
            expected = torch.zeros(site.router.in_features)
            if number in there(experts, path):
                expected = exact.built.sites[path].router.weight[number]
                if start == "given":
                    expected = vectors[experts.names[number]][path]
            assert torch.equal(site.router.weight[number], expected)
        assert site.router.weight.requires_grad


@pytest.mark.parametrize("scope", ["linear", "block", "layer"])
def test_hard_top1_acts_at_full_scale_with_the_gradient_of_the_score(
    tmp_path: Path, scope: str
) -> None:
    experts = load_set(tmp_path)
    model = tiny("llama")
    mixture = molora.compose(model, experts, router={"kind": "hard_top1", "scope": scope})
    with mixture.record(detach=False) as records:
        model(**batch_for(model)).loss.backward()
    for site, record in records.items():
        assert torch.equal(record.gates, torch.ones_like(record.gates))
        assert mixture.built.sites[site].router.weight.grad.abs().max() > 0
    site = next(iter(mixture.built.sites.values()))
    x = torch.randn(7, site.router.in_features)
    routing = site.decide(x)
    gradient = torch.autograd.grad(routing.gates.sum(), site.router.weight)[0]
    scores_TE = (x @ site.router.weight.T).softmax(dim=-1)
    expected = torch.autograd.grad(scores_TE.max(dim=-1).values.sum(), site.router.weight)[0]
    torch.testing.assert_close(gradient, expected)
    assert expected.abs().max() > 1e-3


def test_routers_made_from_experts_have_nothing_to_train(tmp_path: Path) -> None:
    experts = load_set(tmp_path)
    vectors = vectors_for(experts)
    for router in (
        *("arrow", "spectr", "lag", "uniform"),
        {"kind": "phatgoose", "vectors": vectors},
        {"kind": "average_activation", "vectors": vectors},
    ):
        model = tiny("llama")
        mixture = molora.compose(model, experts, router=router)
        assert sum(mixture.num_parameters().values()) == 0
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("router", ["arrow", "spectr", "lag", "linear", "meteora", "lora_flow"])
def test_padding_changes_nothing(tmp_path: Path, router: str) -> None:
    experts = load_set(tmp_path, RAGGED)
    model = tiny("llama")
    molora.compose(model, experts, router=router)
    batch = batch_for(model, (6, 3), labels=False)
    longer = batch_for(model, (6, 3), labels=False, side="left", extra=2)
    found, moved = logits(model, **batch), logits(model, **longer)
    for row, length in enumerate((6, 3)):
        torch.testing.assert_close(moved[row, -length:], found[row, :length], atol=2e-5, rtol=2e-5)
    assert moved.isfinite().all()

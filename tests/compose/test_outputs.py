"""MoLE: gates that follow from the experts' own outputs, against dense outputs put together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import RAGGED, by_hand, load_set, logits, update
from tiny_models import batch_for, tiny
from torch import Tensor, nn

import molora
from molora.compose.experts import FrozenExperts
from molora.errors import AttachError

SET: dict[str, Any] = {
    **RAGGED,
    "tall": {"lora_bias": True, "target_modules": ["q_proj", "up_proj"]},
}


def composed(tmp_path: Path, **options: Any) -> tuple[nn.Module, molora.Mixture, FrozenExperts]:
    experts = load_set(tmp_path, SET)
    model = tiny("llama")
    mixture = molora.compose(model, experts, **{"router": "mole", **options})
    source = torch.Generator().manual_seed(4)
    for site in mixture.built.sites.values():
        weight_EP, slope_1 = site.router.weight, site.router.log_temperature
        weight_EP.data.copy_(torch.randn(weight_EP.shape, generator=source))
        slope_1.data.copy_(torch.randn(1, generator=source) - 1.5)
    return model, mixture, experts


def logits_of(experts: FrozenExperts, layer: nn.Module, site: Any, path: str, x: Tensor) -> Tensor:
    """(..., E): W · flatten(normalised outputs of all experts) / τ; 0 for who is absent."""
    zero = x.new_zeros(*x.shape[:-1], layer.out_features)
    outputs = [
        update(layer, adapter, path, x) if path in adapter.modules else zero
        for adapter in experts.adapters.values()
    ]
    together_P = nn.functional.normalize(torch.cat(outputs, dim=-1), dim=-1)
    tau = site.router.log_temperature.to(x).exp()
    return together_P @ site.router.weight.to(x).T / tau


@pytest.mark.parametrize("missing", ["mask", "zero", "renorm"])
def test_gates_are_the_softmax_of_a_map_of_all_outputs(tmp_path: Path, missing: str) -> None:
    model, mixture, experts = composed(tmp_path, missing=missing)
    base = tiny("llama").double()

    def gates(path: str, x: Tensor, scale: float = 1.0) -> Tensor:
        site = mixture.built.sites[path]
        there_E = torch.tensor(experts.present(path))
        logits_E = scale * logits_of(experts, base.get_submodule(path), site, path, x)
        if missing == "mask":
            return logits_E.masked_fill(~there_E, -torch.inf).softmax(dim=-1)
        gates_E = logits_E.softmax(dim=-1) * there_E
        return gates_E if missing == "zero" else gates_E / gates_E.sum(-1, keepdim=True)

    found = logits(model)
    torch.testing.assert_close(found, by_hand(experts, gates), atol=5e-5, rtol=5e-5)
    wrong = by_hand(experts, lambda path, x: gates(path, x, 0.5))
    assert (wrong - found).abs().max() > 1e-2
    plain = by_hand(experts, lambda path, x: torch.full((*x.shape[:-1], 5), 0.2))
    assert (plain - found).abs().max() > 1e-2


def test_gradients_are_those_of_dense_outputs(tmp_path: Path) -> None:
    model, mixture, experts = composed(tmp_path)
    model.double()
    for path, site in mixture.built.sites.items():
        linear, router = model.get_submodule(path), site.router
        x_TD = torch.randn(6, linear.in_features, dtype=torch.float64, requires_grad=True)
        weights_TE = torch.randn(6, 5, dtype=torch.float64)
        leaves = [x_TD, router.weight, router.log_temperature]
        found_TE, expected_TE = router(x_TD), logits_of(experts, linear, site, path, x_TD)
        torch.testing.assert_close(found_TE, expected_TE, rtol=1e-5, atol=1e-6)
        found = torch.autograd.grad((found_TE * weights_TE).sum(), leaves)
        expected = torch.autograd.grad((expected_TE * weights_TE).sum(), leaves)
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-6)
            assert reference.abs().max() > 1e-3


def test_a_token_does_not_see_those_after_it(tmp_path: Path) -> None:
    model, _, _ = composed(tmp_path)
    batch = batch_for(model, (7,), labels=False)
    whole = logits(model, **batch)
    short = logits(model, **{name: value[:, :4] for name, value in batch.items()})
    torch.testing.assert_close(short, whole[:, :4], atol=1e-5, rtol=1e-5)


def test_rows_of_nothing_have_equal_logits_and_finite_slopes(tmp_path: Path) -> None:
    experts = load_set(tmp_path, RAGGED)
    mixture = molora.compose(tiny("llama"), experts, router="mole")
    for site in mixture.built.sites.values():
        width = site.router._read_out[0].lora_A.shape[-1]
        x_TD = torch.zeros(3, width, requires_grad=True)
        logits_TE = site.router(x_TD)
        assert not logits_TE.any()
        slopes = torch.autograd.grad(logits_TE.sum(), [x_TD, site.router.weight])
        assert all(slope.isfinite().all() for slope in slopes)


def test_routers_learn_and_experts_may_too(tmp_path: Path) -> None:
    model, mixture, _ = composed(tmp_path, new=["more"], trainable=["math"])
    before = {name: p.detach().clone() for name, p in mixture.named_parameters()}
    optimiser = torch.optim.AdamW(mixture.parameter_groups(3e-2))
    losses = []
    for _ in range(5):
        out = model.train()(**batch_for(model))
        out.loss.backward()
        for parameters in mixture.trainable_parameters().values():
            assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < losses[0]
    for name, parameter in mixture.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_the_balance_is_over_the_mean_gates_of_all_linears(tmp_path: Path) -> None:
    experts = load_set(tmp_path)
    model = tiny("llama")
    mixture = molora.compose(model, experts, router={"kind": "mole", "balance": 2.0})
    batch = batch_for(model)
    with mixture.record() as records:
        out = model.train()(**batch)
    valid = batch["attention_mask"].flatten().bool()
    scores_TE = torch.cat([record.scores[valid] for record in records.values()])
    expected = -2.0 * scores_TE.mean(dim=0).log().sum()
    torch.testing.assert_close(out.aux_loss, expected)
    assert molora.compose(tiny("llama"), experts, router={"kind": "mole", "balance": 0.0})


def test_saved_loaded_and_copied_it_is_the_same(tmp_path: Path) -> None:
    model, mixture, _ = composed(tmp_path / "set")
    expected = logits(model)
    twin = copy.deepcopy(model)
    mixture.save(tmp_path / "saved")
    for site in mixture.built.sites.values():
        site.router._read_out[0].lora_B.data.mul_(-1)  # the copy must not read this bank
    assert (logits(model) - expected).abs().max() > 1e-2
    assert torch.equal(logits(twin), expected)
    fresh = tiny("llama")
    base = logits(fresh)
    loaded = molora.load(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh), expected)
    loaded.detach()
    assert torch.equal(logits(fresh), base)


def test_dora_is_refused_by_name(tmp_path: Path) -> None:
    experts = load_set(tmp_path, {"one": {"use_dora": True}, "two": {}})
    model = tiny("llama")
    with pytest.raises(AttachError, match="magnitude"):
        molora.compose(model, experts, router="mole")
    assert molora.compose(model, experts, router="arrow")


@pytest.mark.slow
def test_it_is_one_graph(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, _, _ = composed(tmp_path, backend="dense")
    batch = batch_for(model, (9, 9), labels=False)
    expected = logits(model, **batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**batch, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()

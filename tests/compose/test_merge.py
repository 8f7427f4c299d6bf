"""Merges of experts with fixed weights, against package peft and dense algebra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora.model
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft_adapters import save_adapter
from tiny_models import tiny
from torch import Tensor, nn

import molora
from molora.compose.experts import FrozenExperts
from molora.compose.lowrank import low_rank_svd
from molora.compose.merging import METHODS, Merged, merge
from molora.compose.merging.elementwise import (
    combination,
    elected_mean,
    keep_at_random,
    keep_largest,
)
from molora.compose.merging.methods import by_factor_values
from molora.errors import ConfigError

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}
TARGETS = ["q_proj", "v_proj", "down_proj"]
PEFT_METHODS = [m for m in METHODS if m not in ("factor", "lego")]
DARE = [m for m in PEFT_METHODS if m.startswith("dare")]
WITHOUT_DRAWS = [
    *((method, "total") for method in PEFT_METHODS if method not in DARE),
    *((method, "frequency") for method in ("ties", "ties_svd")),
]


def saved(tmp_path: Path, **settings: Mapping[str, Any]) -> FrozenExperts:
    """Experts by name, each with settings of its own."""
    for seed, (name, own) in enumerate(settings.items()):
        model = save_adapter(
            tmp_path / name, seed=seed, **{"target_modules": TARGETS, "lora_alpha": 4 + seed, **own}
        )
        if own.get("lora_bias"):
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.dim() == 1:
                    nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(tmp_path / name)
    return molora.load_experts({name: tmp_path / name for name in settings})


def in_peft(experts: FrozenExperts, method: str, **options: Any) -> peft.PeftModel:
    """Package peft's merge of the experts, called "merged"."""
    names = experts.names
    model = peft.PeftModel.from_pretrained(
        tiny("llama"), experts.adapters[names[0]].source, adapter_name=names[0]
    )
    for name in names[1:]:
        model.load_adapter(experts.adapters[name].source, adapter_name=name)
    weights = [WEIGHTS[name] for name in names]
    model.add_weighted_adapter(list(names), weights, "merged", combination_type=method, **options)
    return model


def peft_updates(model: nn.Module, adapter: str = "merged") -> dict[str, Tensor]:
    prefix = "base_model.model."
    return {
        path.removeprefix(prefix): module.get_delta_weight(adapter).detach()
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }


def updates(merged: Merged) -> dict[str, Tensor]:
    return {path: m.scaling * m.lora_B @ m.lora_A for path, m in merged.modules.items()}


def meant(experts: FrozenExperts, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Σ w ΔW in float64, dense."""
    sums: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, m in experts.adapters[name].modules.items():
            update = weight * m.scaling * m.lora_B.double() @ m.lora_A.double()
            sums[path] = sums[path] + update if path in sums else update
    return sums


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a module."""
    assert found.keys() == expected.keys()
    return max(
        float((found[path].double() - dense.double()).norm() / dense.double().norm())
        for path, dense in expected.items()
    )


@pytest.mark.parametrize(("method", "sign"), WITHOUT_DRAWS)
def test_a_merge_is_that_of_peft(method: str, sign: str, tmp_path: Path) -> None:
    experts = saved(tmp_path, a={"r": 4}, b={"r": 4}, c={"r": 4})
    pruned = method.startswith(("ties", "magnitude"))
    options = {"density": 0.4} if pruned else {}
    signs: dict[str, Any] = {"majority_sign": sign} if method.startswith("ties") else {}
    ours = merge(experts, WEIGHTS, method=method, **options, **signs)
    theirs = in_peft(experts, method, majority_sign_method=sign, **options)
    assert apart(updates(ours), peft_updates(theirs)) < 3e-6
    # the weights are not those of another merge
    others = merge(experts, {**WEIGHTS, "b": 0.4}, method=method, **options, **signs)
    assert apart(updates(others), peft_updates(theirs)) > 0.01


@pytest.mark.parametrize("method", DARE)
def test_dare_with_the_same_draws_is_that_of_peft(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = saved(tmp_path, a={"r": 4}, b={"r": 4}, c={"r": 4})
    # peft draws from the global generator, also for the new adapter's start, which this follows
    monkeypatch.setattr(
        peft.tuners.lora.model, "_freeze_adapter", lambda model, name: torch.manual_seed(5)
    )
    theirs = peft_updates(in_peft(experts, method, density=0.6))
    generator = torch.Generator().manual_seed(5)
    by_value = combination(
        method.removesuffix("_svd"), density=0.6, majority_sign="total", generator=generator
    )
    for path, expected in theirs.items():  # the order in which peft merges
        modules = [experts.adapters[name].modules[path] for name in experts.names]
        if method.endswith("_svd"):
            dense = torch.stack([m.scaling * m.lora_B @ m.lora_A for m in modules])
            values = by_value(dense, torch.tensor(list(WEIGHTS.values())))
            svd = low_rank_svd(torch.eye(values.shape[1]), values)
            found = (svd.U[:, :4] * svd.S[:4]) @ svd.Vh[:4]
        else:
            lora_A, lora_B = by_factor_values(
                by_value,
                torch.stack([m.lora_A for m in modules]),
                torch.stack([m.lora_B for m in modules]),
                [m.scaling for m in modules],
                list(WEIGHTS.values()),
            )
            found = lora_B @ lora_A
        assert apart({path: found}, {path: expected}) < 3e-6
    assert apart(updates(merge(experts, WEIGHTS, method=method, density=0.6)), theirs) > 0.1


@pytest.mark.parametrize("method", ["dare_linear_svd", "dare_ties_svd"])
def test_dare_repeats_with_a_seed_and_module_by_module(method: str, tmp_path: Path) -> None:
    experts = saved(tmp_path, a={"r": 4}, b={"r": 4}, c={"r": 4, "target_modules": ["q_proj"]})
    one = merge(experts, WEIGHTS, method=method, density=0.5, seed=3)
    two = merge(experts, WEIGHTS, method=method, density=0.5, seed=3)
    other = merge(experts, WEIGHTS, method=method, density=0.5, seed=4)
    assert apart(updates(two), updates(one)) == 0
    assert apart(updates(other), updates(one)) > 0.1
    # a module's draws are those without the other modules
    path = "model.layers.1.mlp.down_proj"
    fewer = {n: experts.adapters[n] for n in ("a", "b")}
    alone = merge(
        FrozenExperts(fewer, ()), {"a": 0.7, "b": -0.4}, method=method, density=0.5, seed=3
    )
    assert torch.equal(updates(alone)[path], updates(one)[path])


def test_dare_keeps_the_expectation() -> None:
    stack = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    mean = sum(keep_at_random(stack, 0.3, generator) for _ in range(4000)) / 4000
    kept = keep_at_random(stack, 0.3, generator)
    assert float((mean - stack).norm() / stack.norm()) < 0.05
    assert float((kept - stack).norm() / stack.norm()) > 0.5
    values = kept[kept != 0] / stack[kept != 0]
    assert torch.allclose(values, torch.full_like(values, 1 / 0.3))


def test_ties_by_hand() -> None:
    stack_E = torch.tensor([[3.0, -1, 0, 2], [1.0, 4, 0, -2], [-9.0, 1, 5, 0]])
    weights_E = torch.tensor([1.0, 2.0, 3.0])
    # signs by sum: -, +, +, + (a draw); by number: +, +, +, +
    total = elected_mean(stack_E, weights_E, majority_sign="total")
    assert total.tolist() == [-27.0, (8 + 3) / 2, 15.0, 2.0]
    frequency = elected_mean(stack_E, weights_E, majority_sign="frequency")
    assert frequency.tolist() == [(3 + 2) / 2, (8 + 3) / 2, 15.0, 2.0]
    assert keep_largest(stack_E, 0.5).tolist() == [[3, 0, 0, 2], [0, 4, 0, -2], [-9, 0, 5, 0]]


RAGGED: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "use_rslora": True, "lora_alpha": 3},
    "b": {"r": 6, "target_modules": ["q_proj", "k_proj"]},
    "c": {"r": 3, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"down_proj": 11}},
}


def test_concatenation_is_exact_for_any_ranks_targets_and_scalings(tmp_path: Path) -> None:
    experts = saved(tmp_path, **RAGGED)
    merged = merge(experts, WEIGHTS)
    assert merged.method == "cat"
    assert set(merged.modules) == set(experts.modules)
    assert apart(updates(merged), meant(experts, WEIGHTS)) < 1e-6
    assert apart(updates(merged), meant(experts, {**WEIGHTS, "a": 0.8})) > 0.01
    assert merged.modules["model.layers.0.self_attn.q_proj"].rank == 2 + 6 + 3
    assert merged.modules["model.layers.0.self_attn.k_proj"].rank == 6
    assert set(merged.residuals.values()) == {0.0}
    for path, module in merged.modules.items():
        assert module.scaling == 1
        dense = meant(experts, WEIGHTS)[path]
        assert module.update_norm == pytest.approx(float(dense.norm()), rel=1e-5)


def test_truncation_is_the_best_of_its_rank_and_reports_what_is_lost(tmp_path: Path) -> None:
    experts = saved(tmp_path, **RAGGED)
    for rank in (1, 4, 64):
        merged = merge(experts, WEIGHTS, method="svd", rank=rank)
        for path, dense in meant(experts, WEIGHTS).items():
            U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
            best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            found = updates(merged)[path].double()
            assert float((found - best).norm() / dense.norm()) < 1e-6
            lost = float((found - dense).norm() / dense.norm())
            assert merged.residuals[path] == pytest.approx(lost, abs=1e-6)
            assert merged.modules[path].rank <= rank
        assert (max(merged.residuals.values()) > 0.1) == (rank < 11)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reports_the_residual_of_what_it_returns(method: str, tmp_path: Path) -> None:
    experts = saved(tmp_path, a={"r": 4}, b={"r": 4, "use_rslora": True}, c={"r": 4})
    options = {"density": 0.5} if method.startswith(("ties", "dare", "magn")) else {}
    merged = merge(experts, WEIGHTS, method=method, **options)
    dense = meant(experts, WEIGHTS)
    for path, update in updates(merged).items():
        lost = float((update.double() - dense[path]).norm() / dense[path].norm())
        assert merged.residuals[path] == pytest.approx(lost, abs=1e-6)
    assert (max(merged.residuals.values()) < 1e-6) == (method == "cat")


def test_with_rslora_the_result_has_the_scale_that_peft_misses(tmp_path: Path) -> None:
    rs = {"r": 4, "use_rslora": True}
    experts = saved(tmp_path, a=rs, b=rs, c=rs)
    theirs = peft_updates(in_peft(experts, "cat"))
    ours = updates(merge(experts, WEIGHTS))
    dense = meant(experts, WEIGHTS)
    assert apart(ours, dense) < 1e-6
    # peft 0.21.2 keeps use_rslora with alpha = rank: √12 times too much
    assert apart(theirs, {path: update * 12**0.5 for path, update in dense.items()}) < 1e-6


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "factor"])
def test_biases_are_merged_where_peft_drops_them(method: str, tmp_path: Path) -> None:
    experts = saved(
        tmp_path, a={"r": 4, "lora_bias": True}, b={"r": 4}, c={"r": 4, "lora_bias": True}
    )
    merged = merge(experts, WEIGHTS, method=method)
    for path, module in merged.modules.items():
        a, c = (experts.adapters[name].modules[path] for name in ("a", "c"))
        assert a.bias is not None
        assert c.bias is not None
        shared = a.scaling if method == "factor" else c.scaling
        expected = WEIGHTS["a"] * a.scaling * a.bias + WEIGHTS["c"] * shared * c.bias
        assert module.bias is not None
        assert torch.allclose(module.bias, expected)
        assert module.bias.norm() > 0.1
    without = merge(experts, {"b": 1.0}, method=method)
    assert all(module.bias is None for module in without.modules.values())


def test_the_factor_merge_is_lorahubs(tmp_path: Path) -> None:
    experts = saved(tmp_path, a={"r": 4}, b={"r": 4}, c={"r": 4})
    merged = merge(experts, WEIGHTS, method="factor")
    for path, module in merged.modules.items():
        parts = [experts.adapters[name].modules[path] for name in WEIGHTS]
        terms = [
            wi * wj * pi.lora_B.double() @ pj.lora_A.double()
            for wi, pi in zip(WEIGHTS.values(), parts, strict=True)
            for wj, pj in zip(WEIGHTS.values(), parts, strict=True)
        ]
        expected = parts[0].scaling * sum(terms, start=torch.zeros(()))
        assert apart({path: module.lora_B @ module.lora_A}, {path: expected}) < 1e-6
    assert any("first expert's scaling" in note for note in merged.notes)  # alphas differ


@pytest.mark.parametrize("missing", ["zero", "renorm"])
def test_experts_without_a_module(missing: Any, tmp_path: Path) -> None:
    experts = saved(tmp_path, **RAGGED)
    merged = merge(experts, WEIGHTS, missing=missing)
    path = "model.layers.1.self_attn.k_proj"  # b alone has it
    expected = experts.adapters["b"].modules[path]
    factor = WEIGHTS["b"] if missing == "zero" else sum(WEIGHTS.values())
    dense = factor * expected.scaling * expected.lora_B @ expected.lora_A
    assert apart({path: updates(merged)[path]}, {path: dense}) < 1e-6
    with pytest.raises(ConfigError, match=r"a, c do not adapt .*k_proj"):
        merge(FrozenExperts({n: experts.adapters[n] for n in "bac"}, ()), missing="error")


def test_the_default_weights_are_the_mean(tmp_path: Path) -> None:
    experts = saved(tmp_path, a={"r": 4}, b={"r": 2})
    merged = merge(experts)
    assert dict(merged.weights) == {"a": 0.5, "b": 0.5}
    assert apart(updates(merged), meant(experts, {"a": 0.5, "b": 0.5})) < 1e-6


def test_who_is_not_named_takes_no_part_and_nothing_is_changed(tmp_path: Path) -> None:
    experts = saved(tmp_path, a={"r": 4}, b={"r": 4}, c={"r": 4})
    before = {
        (name, path): (m.lora_A.clone(), m.lora_B.clone())
        for name, adapter in experts.adapters.items()
        for path, m in adapter.modules.items()
    }
    for method in METHODS:
        options = {"density": 0.5} if method.startswith(("ties", "dare", "magn")) else {}
        two = merge(experts, {"c": 1.0, "a": 0.5}, method=method, **options)
        chosen = FrozenExperts({n: experts.adapters[n] for n in ("a", "c")}, ())
        other = merge(chosen, {"a": 0.5, "c": 1.0}, method=method, **options)
        assert apart(updates(two), updates(other)) == 0
    for (name, path), (lora_A, lora_B) in before.items():
        module = experts.adapters[name].modules[path]
        assert torch.equal(module.lora_A, lora_A)
        assert torch.equal(module.lora_B, lora_B)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tise"}, "method='tise' is none of cat, svd"),
        ({"rank": 4}, "rank=4 means nothing to method='cat'"),
        ({"method": "ties"}, "needs density"),
        ({"method": "ties", "density": 0.0}, "density=0.0"),
        ({"method": "svd", "density": 0.5}, "density=0.5 means nothing"),
        ({"method": "svd", "seed": 1}, "seed=1 means nothing"),
        ({"method": "svd", "rank": 0}, "rank=0"),
        ({"method": "linear", "majority_sign": "total"}, "majority_sign='total' means nothing"),
        ({"method": "ties", "density": 0.5, "majority_sign": "mean"}, "majority_sign='mean'"),
        ({"missing": "mask"}, "missing='mask'"),
        ({"weights": {"d": 1.0}}, "weights name d; the experts are a, b"),
        ({"weights": {}}, "weights name nobody"),
        ({"weights": {"a": float("nan")}}, "weights of a are not finite"),
        ({"method": "linear"}, r"has the ranks 3, 4. Use svd or cat"),
        ({"method": "ties", "density": 0.5}, r"has the ranks 3, 4. Use ties_svd"),
    ],
)
def test_what_cannot_be_merged(options: Any, message: str, tmp_path: Path) -> None:
    experts = saved(tmp_path, a={"r": 4}, b={"r": 3})
    with pytest.raises(ConfigError, match=message):
        merge(experts, **options)


def test_experts_of_stacked_weights_are_not_dropped_in_silence(tmp_path: Path) -> None:
    for name, own in {"a": {}, "b": {"target_parameters": ["mlp.experts.down_proj"]}}.items():
        save_adapter(tmp_path / name, "mixtral", **own)
    experts = molora.load_experts({name: tmp_path / name for name in "ab"})
    with pytest.raises(ConfigError, match="b adapts stacked weights of the base's own experts"):
        merge(experts)
    assert merge(experts, {"a": 1.0}).modules


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"use_dora": True}, "b uses DoRA"), ({"alora_invocation_tokens": [5, 6]}, "b is an activ")],
)
def test_experts_that_are_no_sum_of_factors(setting: Any, message: str, tmp_path: Path) -> None:
    experts = saved(tmp_path, a={}, b={**setting, "task_type": "CAUSAL_LM"})
    with pytest.raises(ConfigError, match=message):
        merge(experts)
    assert merge(experts, {"a": 1.0}).modules

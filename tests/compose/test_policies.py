"""What becomes of an expert's part at a linear that it does not adapt: gates computed by hand."""

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
from molora.errors import ConfigError
from molora.routing.statistics import RoutingStatistics

LOGITS = torch.tensor([0.3, -0.2, 1.1, 0.6])
PRESENT = {  # in the order of RAGGED: math, code, law, art
    "layers.0.self_attn.q_proj": [1, 1, 0, 1],
    "layers.1.self_attn.q_proj": [1, 1, 1, 1],
    "layers.0.self_attn.k_proj": [0, 0, 0, 1],
    "layers.1.self_attn.k_proj": [0, 0, 0, 1],
    "layers.0.self_attn.v_proj": [1, 0, 0, 0],
    "layers.1.self_attn.v_proj": [1, 0, 1, 0],
    "layers.0.mlp.up_proj": [0, 1, 0, 0],
    "layers.1.mlp.up_proj": [0, 1, 0, 0],
    "layers.0.mlp.down_proj": [1, 1, 0, 1],
    "layers.1.mlp.down_proj": [1, 1, 0, 1],
}


def present(path: str) -> list[bool]:
    return [bool(p) for p in PRESENT[path.removeprefix("model.")]]


def gates_of(values: list[float], there: list[bool], choosable: list[bool], policy: str) -> Any:
    """The two best of softmax over the choosable, divided by their sum; then the policy."""
    allowed = [e for e in range(4) if choosable[e]]
    total = sum(math.exp(values[e]) for e in allowed)
    best = sorted(allowed, key=lambda e: -values[e])[:2]
    gates = {e: math.exp(values[e]) / total for e in best}
    gates = {e: gate / sum(gates.values()) for e, gate in gates.items()}
    own = {e: gate for e, gate in gates.items() if there[e]}
    if policy == "renorm" and own:
        own = {e: gate * sum(gates.values()) / sum(own.values()) for e, gate in own.items()}
    return [own.get(e, 0.0) for e in range(4)]


def rows(values_E: Tensor, there: list[bool], choosable: list[bool], policy: str) -> Tensor:
    flat = [gates_of(row, there, choosable, policy) for row in values_E.reshape(-1, 4).tolist()]
    return torch.tensor(flat).view(*values_E.shape[:-1], 4)


@pytest.mark.parametrize("policy", ["mask", "renorm", "zero", None])
def test_a_router_of_each_linear(tmp_path: Path, policy: str | None) -> None:
    experts = load_set(tmp_path, RAGGED)
    model = tiny("llama")
    mixture = molora.compose(model, experts, router="linear", missing=policy)
    for site in mixture.built.sites.values():
        site.router.weight.data.mul_(4)
    weights = {p: site.router.weight.detach() for p, site in mixture.built.sites.items()}
    assert [f"model.{path}" for path in sorted(PRESENT)] == sorted(weights)
    kind = policy or "mask"

    def gates(path: str, x: Tensor, kind: str = kind) -> Tensor:
        there = present(path)
        choosable = there if kind == "mask" else [True] * 4
        return rows(x.float() @ weights[path].T, there, choosable, kind)

    found = logits(model)
    torch.testing.assert_close(found, by_hand(experts, gates), atol=3e-5, rtol=3e-5)
    for other in {"mask", "renorm", "zero"} - {kind}:
        wrong = by_hand(experts, lambda path, x, other=other: gates(path, x, other))
        assert (found - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("policy", ["mask", "renorm", "zero", None])
@pytest.mark.parametrize("scope", ["block", "layer"])
def test_a_router_of_several_linears(tmp_path: Path, policy: str | None, scope: str) -> None:
    experts = load_set(tmp_path, RAGGED)
    model = tiny("llama")
    router = {"kind": "linear", "scope": scope, "bias": True}
    mixture = molora.compose(model, experts, router=router, missing=policy)
    for site in mixture.built.sites.values():
        site.router.weight.data.zero_()
        site.router.bias.data.copy_(LOGITS)
    kind = policy or "zero"

    def gates(path: str, x: Tensor, kind: str = kind) -> Tensor:
        layer, block = path.split(".")[2], path.split(".")[3]
        members = [
            present(f"model.{p}")
            for p in PRESENT
            if p.split(".")[1] == layer and (scope == "layer" or p.split(".")[2] == block)
        ]
        anywhere = [any(column) for column in zip(*members, strict=True)]
        choosable = anywhere if kind == "mask" else [True] * 4
        return rows(LOGITS.expand(*x.shape[:-1], 4), present(path), choosable, kind)

    found = logits(model)
    torch.testing.assert_close(found, by_hand(experts, gates), atol=3e-5, rtol=3e-5)
    for other in {"renorm", "zero"} - {kind}:
        wrong = by_hand(experts, lambda path, x, other=other: gates(path, x, other))
        assert (found - wrong).abs().max() > 1e-3


def test_an_error_names_what_lacks_where(tmp_path: Path) -> None:
    experts = load_set(tmp_path, RAGGED)
    model = tiny("llama")
    with pytest.raises(
        ConfigError, match=r"expert math does not adapt model\.layers\.\d.*more linears.*Leave it"
    ):
        molora.compose(model, experts, missing="error")
    alike = load_set(tmp_path / "alike")
    mixture = molora.compose(model, alike, missing="error")
    assert mixture.built.sites


def test_negative_weights_grow_to_no_sum(tmp_path: Path) -> None:
    experts = load_set(tmp_path, RAGGED)
    weights = {"math": 1.0, "code": -0.9, "law": 0.5, "art": 0.0}
    router = {"kind": "fixed", "weights": weights}
    with pytest.raises(ConfigError, match=r"negative weight \(-0\.9\). Use 'zero'"):
        molora.compose(tiny("llama"), experts, router=router, missing="renorm")
    molora.compose(tiny("llama"), experts, router=router, missing="zero")


@pytest.mark.parametrize("router", ["arrow", "spectr", "lag", "linear", "hard_top1", "uniform"])
def test_records_and_statistics_leave_out_who_is_absent(tmp_path: Path, router: str) -> None:
    experts = load_set(tmp_path, RAGGED)
    model = tiny("llama")
    given: Any = {"kind": router, "preselect": 2} if router == "lag" else router
    if router in ("arrow", "spectr", "linear"):
        given = {"kind": router, "top_k": 3}
    if router == "hard_top1":
        given = {"kind": router, "scope": "linear"}
    mixture = molora.compose(model, experts, router=given, missing="mask")
    with torch.no_grad(), mixture.record() as records, mixture.statistics() as statistics:
        model(**batch_for(model, labels=False))
    assert isinstance(statistics, RoutingStatistics)
    for path, record in records.items():
        there_E = torch.tensor(present(path))
        there_TK = there_E[record.expert_index]
        assert not record.selected[~there_TK].any()
        assert not record.gates[~there_TK].any()
        assert record.gates.isfinite().all()
        acting = record.selected & (record.gates != 0)
        assert acting.any(dim=1).all()
        load_E = statistics.loads()[path]
        assert not load_E[~there_E].any()
        assert load_E.sum() == pytest.approx(1)
        for value in (statistics.entropies()[path], statistics.margins()[path]):
            assert value.isfinite()
        assert 0 <= statistics.entropies()[path] <= math.log(sum(there_E.tolist())) + 1e-5


@pytest.mark.parametrize("weights", [(0.5, -1.0, 0.25, 0.0), (0, 0, 0, 0), (1, -1, 0, 0)])
def test_statistics_of_weights_that_are_no_probabilities_are_finite(
    tmp_path: Path, weights: tuple[float, ...]
) -> None:
    experts = load_set(tmp_path, RAGGED)
    model = tiny("llama")
    router = {"kind": "fixed", "weights": dict(zip(RAGGED, weights, strict=True))}
    mixture = molora.compose(model, experts, router=router, missing="zero")
    with torch.no_grad(), mixture.statistics() as statistics:
        model(**batch_for(model, labels=False))
    for numbers in (statistics.entropies(), statistics.margins(), statistics.loads()):
        assert all(value.isfinite().all() for value in numbers.values())
    share_E = torch.tensor(weights).abs()
    share_E = share_E / share_E.sum().clamp_min(1e-9)
    entropy = float(torch.special.entr(share_E).sum())
    assert all(
        float(v) == pytest.approx(entropy, abs=1e-5) for v in statistics.entropies().values()
    )


@pytest.mark.parametrize("router", ["arrow", "lag", "linear", "spectr"])
def test_a_row_of_zeros_routes_to_somebody(tmp_path: Path, router: str) -> None:
    """All experts are as near to it as another, those that are absent included."""
    experts = load_set(tmp_path, RAGGED)
    model = tiny("llama")
    given: Any = {"kind": router, "preselect": 1} if router == "lag" else router
    mixture = molora.compose(model, experts, router=given)
    for path, site in mixture.built.sites.items():
        routing = site.decide(torch.zeros(3, model.get_submodule(path).in_features))
        assert routing.gates.isfinite().all()
        torch.testing.assert_close(routing.gates.sum(dim=1), torch.ones(3))
        assert torch.tensor(present(path))[routing.expert_index[routing.gates > 0]].all()

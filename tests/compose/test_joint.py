"""Experts on a shared basis, against dense algebra in float64 and cases whose basis is known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import save_adapter
from tiny_models import batch_for, tiny
from torch import Tensor

import molora
from molora.compose.experts import FrozenExperts
from molora.compose.joint import Kind, compress, project
from molora.compose.joint_solvers import full_basis
from molora.errors import ConfigError
from molora.io.peft_adapter import Adapter, AdapterModule

F, D = 14, 11
KINDS: list[Kind] = ["full", "diagonal"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts_of(*modules: AdapterModule) -> FrozenExperts:
    adapters = {
        f"e{i}": Adapter(Path("x"), {"a.proj": one}, None, None, False, str(i), ())
        for i, one in enumerate(modules)
    }
    return FrozenExperts(adapters, ())


def module(A: Tensor, B: Tensor, scaling: float = 1.0) -> AdapterModule:
    return AdapterModule(A, B, scaling, 0.0)


def dense(one: AdapterModule) -> Tensor:
    return one.scaling * one.lora_B.double() @ one.lora_A.double()


def planted(kind: Kind, count: int = 6) -> list[AdapterModule]:
    """Experts on one basis of rank 3, each of rank 3 and with factors that hide it."""
    U, V = random(F, 3, seed=1), random(D, 3, seed=2)
    modules = []
    for e in range(count):
        core = random(3, 3, seed=10 + e)
        core = core if kind == "full" else core.diagonal().diag()
        mixer = random(3, 3, seed=50 + e)
        modules.append(module(mixer @ core @ V.T, U @ torch.linalg.inv(mixer), 0.5 + e))
    return modules


@pytest.mark.parametrize("kind", KINDS)
def test_a_basis_that_is_there_is_found(kind: Kind) -> None:
    experts = experts_of(*planted(kind))
    joint = compress(experts, 3, kind=kind, iterations=3000, tolerance=1e-14)
    assert max(joint.errors.values()) < 1e-5
    assert max(joint.modules["a.proj"].errors.values()) < 1e-5
    again = joint.as_experts()
    for name, adapter in experts.adapters.items():
        expected = dense(adapter.modules["a.proj"])
        found = again.adapters[name].modules["a.proj"]
        assert (found.rank, found.scaling) == (3, 1.0)
        assert float((dense(found) - expected).norm() / expected.norm()) < 1e-5
        assert found.update_norm == pytest.approx(float(expected.norm()), rel=1e-5)
    less = compress(experts, 2, kind=kind)
    assert min(less.errors.values()) > 0.02


def test_full_cores_are_no_diagonal_ones() -> None:
    experts = experts_of(*planted("full"))
    assert max(compress(experts, 3, kind="diagonal").errors.values()) > 0.05


def unlike(ranks: tuple[int, ...] = (2, 3, 1, 4)) -> list[AdapterModule]:
    return [
        module(random(r, D, seed=e), random(F, r, seed=20 + e), (-1) ** e * (0.3 + e))
        for e, r in enumerate(ranks)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("relative", [True, False])
def test_errors_are_those_of_the_result(kind: Kind, rank: int, relative: bool) -> None:
    experts = experts_of(*unlike())
    joint = compress(experts, rank, kind=kind, relative=relative)
    again = joint.as_experts()
    for name, adapter in experts.adapters.items():
        expected = dense(adapter.modules["a.proj"])
        lost = float((dense(again.adapters[name].modules["a.proj"]) - expected).norm())
        assert joint.errors[name] == pytest.approx(lost / float(expected.norm()), rel=1e-4)
        assert 0 < joint.errors[name] < 1
        assert any("relative error" in note for note in again.adapters[name].notes)
    basis = joint.modules["a.proj"]
    if kind == "full":
        assert torch.allclose(basis.U.T @ basis.U, torch.eye(rank), atol=1e-6)
        assert torch.allclose(basis.V.T @ basis.V, torch.eye(rank), atol=1e-6)
    assert torch.allclose(basis.U.norm(dim=0), torch.ones(rank), atol=1e-6)
    size = basis.U.numel() + basis.V.numel() + 4 * (rank * rank if kind == "full" else rank)
    assert joint.share == pytest.approx(size / ((F + D) * (2 + 3 + 1 + 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_basis_for_all_units_is_exact(kind: Kind) -> None:
    """As many columns as there are ranks in all, as far as the matrix has room for them."""
    experts = experts_of(*unlike((2, 3, 1)))
    assert max(compress(experts, 6, kind=kind).errors.values()) < 1e-6
    many = experts_of(*unlike())
    if kind == "full":
        assert max(compress(many, 99).errors.values()) < 1e-6
        assert compress(many, 99).modules["a.proj"].U.shape == (F, 10)


def test_full_bases_are_those_of_dense_eigenvectors() -> None:
    updates = [(one.lora_A, one.lora_B * one.scaling) for one in unlike()]
    U, V = full_basis(updates, 3, iterations=2000, tolerance=0.0)
    matrices = [b @ a for a, b in updates]
    expected_V = torch.linalg.eigh(sum(m.T @ m for m in matrices)).eigenvectors[:, -3:]
    for _ in range(2000):
        gram = torch.stack([m @ expected_V @ expected_V.T @ m.T for m in matrices]).sum(0)
        expected_U = torch.linalg.eigh(gram).eigenvectors[:, -3:]
        gram = torch.stack([m.T @ expected_U @ expected_U.T @ m for m in matrices]).sum(0)
        expected_V = torch.linalg.eigh(gram).eigenvectors[:, -3:]
    assert torch.allclose(U @ U.T, expected_U @ expected_U.T, atol=1e-6)
    assert torch.allclose(V @ V.T, expected_V @ expected_V.T, atol=1e-6)
    start = torch.linalg.eigh(sum(m.T @ m for m in matrices)).eigenvectors[:, -3:]
    assert not torch.allclose(V @ V.T, start @ start.T, atol=1e-3)  # the steps do something


@pytest.mark.parametrize("kind", KINDS)
def test_more_steps_leave_less(kind: Kind) -> None:
    experts = experts_of(*unlike())
    lost = [
        sum(
            e**2 for e in compress(experts, 3, kind=kind, iterations=n, tolerance=0).errors.values()
        )
        for n in (1, 2, 5, 40)
    ]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(lost))
    assert lost[-1] < lost[0] - 1e-4


def test_diagonal_bases_are_no_worse_than_gradient_descent_finds() -> None:
    experts = experts_of(*unlike())
    matrices = torch.stack([dense(a.modules["a.proj"]) for a in experts.adapters.values()])
    matrices = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    best = float("inf")
    for seed in range(3):
        parts = [random(n, 3, seed=seed + 7 * n).requires_grad_() for n in (F, D, 4)]
        optimizer = torch.optim.LBFGS(parts, max_iter=500, line_search_fn="strong_wolfe")

        def loss(parts: list[Tensor] = parts) -> Tensor:
            U, V, sigma = parts
            return (matrices - torch.einsum("fc,dc,ec->efd", U, V, sigma)).square().sum()

        def closure(optimizer: Any = optimizer, loss: Any = loss) -> Tensor:
            optimizer.zero_grad()
            value: Tensor = loss()
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, loss().item())
    joint = compress(experts, 3, kind="diagonal", iterations=2000, tolerance=1e-12)
    assert sum(e**2 for e in joint.errors.values()) < best * 1.02


def test_relative_errors_count_unless_asked_otherwise() -> None:
    loud, quiet = unlike((3, 3))
    experts = experts_of(replace(loud, scaling=100.0), quiet)
    by_norm = compress(experts, 3, relative=False).errors
    fair = compress(experts, 3).errors
    assert by_norm["e0"] < 0.05
    assert by_norm["e1"] > 0.5
    assert fair["e0"] == pytest.approx(fair["e1"], abs=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_added_to_a_basis_that_stays(kind: Kind) -> None:
    modules = planted(kind)
    joint = compress(
        experts_of(*modules[:5]), 3, kind=kind, iterations=3000, tolerance=1e-14
    ).modules["a.proj"]
    core, error = project(joint, modules[5], kind)
    assert error < 1e-4
    expected = dense(modules[5])
    left = joint.U @ core if kind == "full" else joint.U * core
    assert float((left.double() @ joint.V.double().T - expected).norm() / expected.norm()) < 1e-4
    core, error = project(joint, unlike()[3], kind)
    best = min(
        float((dense(unlike()[3]) - (left * scale).double() @ joint.V.double().T).norm())
        for scale in (0.0, 0.9, 1.1)
        for left in [joint.U @ core if kind == "full" else joint.U * core]
    )
    assert 0.3 < error <= best / float(dense(unlike()[3]).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_updates_of_zero_and_modules_that_are_missing(kind: Kind, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", r=4)
    save_adapter(tmp_path / "b", seed=1, r=2, target_modules=["q_proj", "up_proj"])
    experts = molora.load_experts({"a": tmp_path / "a", "b": tmp_path / "b"})
    modules = dict(experts.adapters["a"].modules)
    path = "model.layers.0.self_attn.q_proj"
    modules[path] = replace(
        modules[path], lora_B=torch.zeros_like(modules[path].lora_B), bias=torch.ones(48)
    )
    silent = replace(experts.adapters["a"], modules=modules)
    before = modules[path].lora_A.clone()
    joint = compress(FrozenExperts({**experts.adapters, "a": silent}, ()), 4, kind=kind)
    assert joint.modules[path].errors["a"] == 0
    assert set(joint.modules["model.layers.1.mlp.up_proj"].cores) == {"b"}
    again = joint.as_experts()
    for name, adapter in experts.adapters.items():
        assert list(again.adapters[name].modules) == list(adapter.modules)
    found = again.adapters["a"].modules[path]
    assert found.update_norm == 0
    assert found.bias is not None
    assert torch.allclose(found.bias, torch.full((48,), modules[path].scaling))
    assert torch.equal(modules[path].lora_A, before)
    nothing = experts_of(*(module(torch.ones(2, D), torch.zeros(F, 2)) for _ in range(2)))
    assert compress(nothing, 1, kind=kind).errors == {"e0": 0.0, "e1": 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_experts_go_on_a_model(kind: Kind, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, seed=seed, r=4)
    experts = molora.load_experts({name: tmp_path / name for name in "ab"})
    joint = compress(experts, 5, kind=kind).as_experts()
    assert {one.sha256 for one in joint.adapters.values()}.isdisjoint(
        one.sha256 for one in experts.adapters.values()
    )
    model, reference = tiny("llama"), tiny("llama")
    batch = batch_for(model, labels=False)
    molora.compose(model, joint, router="uniform")
    with torch.no_grad():
        found = model(**batch).logits
        plain = reference(**batch).logits
        for path in joint.modules:
            updates = [dense(one.modules[path]) for one in joint.adapters.values()]
            reference.get_submodule(path).weight += ((updates[0] + updates[1]) / 2).float()
        expected = reference(**batch).logits
    assert torch.allclose(found, expected, atol=2e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_what_cannot_be_compressed(tmp_path: Path) -> None:
    experts = experts_of(*unlike())
    with pytest.raises(ConfigError, match="rank=0"):
        compress(experts, 0)
    with pytest.raises(ConfigError, match="kind='block'"):
        compress(experts, 2, kind="block")  # type: ignore[arg-type]
    save_adapter(tmp_path / "a", use_dora=True)
    with pytest.raises(ConfigError, match="a uses DoRA"):
        compress(molora.load_experts({"a": tmp_path / "a"}), 2)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_experts_that_resemble_each_other_need_no_more_than_one(noise: float) -> None:
    """Where the leading pairs of each are copies of few, of which a start must not be made."""
    A, B = random(3, D), random(F, 3, seed=9)
    modules = [module(A, B + noise * random(F, 3, seed=100 + e), 1 + e / 9) for e in range(8)]
    assert max(compress(experts_of(*modules), 3, kind="diagonal").errors.values()) < 0.05

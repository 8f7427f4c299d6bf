"""Every backend of every op, forward and backward, against loops over rows and experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_problems import (
    CASES,
    LOOPS,
    RUNNABLE,
    Problem,
    assert_same,
    call,
    loop_mix,
    plain_low_precision,
    problem,
    results,
)
from torch import Tensor

from molora.errors import BackendError
from molora.kernels import BACKENDS, backend, count_calls

backends = pytest.mark.parametrize("kernels", RUNNABLE.values(), ids=RUNNABLE)
ops = pytest.mark.parametrize("op", ["lora_mix", "lora_rows"])


@backends
@ops
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_loops(kernels, op, case):
    p = CASES[case]
    if p.index is None and op == "lora_rows":  # rows are of chosen experts: choose them all
        p = replace(p, index=torch.arange(len(p.lora_B)).expand(len(p.x), -1))
    assert_same(call(kernels, op), op, p)
    assert_same(call(kernels, op), op, p.to(torch.float32), tolerance=2e-5)


@backends
@ops
@given(data=st.data())
def test_any_shape_is_that_of_the_loops(kernels, op, data):
    E = data.draw(st.integers(1, 5))
    p = problem(
        T=data.draw(st.integers(0, 6)),
        D=data.draw(st.integers(1, 6)),
        F=data.draw(st.integers(1, 6)),
        E=E,
        R=data.draw(st.integers(1, 4)),
        K=data.draw(st.integers(1, E)),
        shared_A=data.draw(st.booleans()),
        base=data.draw(st.sampled_from(["", "w", "wb", "wt", "wtb"])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    assert_same(call(kernels, op), op, p)


@backends
@ops
@pytest.mark.parametrize("base", ["", "wb"], ids=["update", "with_base"])
@pytest.mark.parametrize("shared_A", [False, True], ids=["own_A", "shared_A"])
def test_gradcheck(kernels, op, shared_A, base):
    p = problem(T=3, shared_A=shared_A, base=base)
    run = call(kernels, op)
    names = ("x", "gates", "lora_A", "lora_B") if op == "lora_mix" else ("x", "lora_A", "lora_B")

    def of_leaves(*values: Tensor) -> Tensor:
        return run(replace(p, **dict(zip(names, values, strict=True))))

    leaves = [getattr(p, name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(of_leaves, leaves)


# ------------------------------------------------------------------ low precision


@backends
@ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["", "wb"], ids=["update", "with_base"])
@pytest.mark.parametrize("shared_A", [False, True], ids=["own_A", "shared_A"])
def test_error_in_low_precision_is_at_most_twice_that_of_plain_torch(
    kernels, op, dtype, shared_A, base
):
    p = problem(T=65, D=48, F=40, E=6, R=4, K=2, shared_A=shared_A, base=base).to(dtype)
    exact = results(LOOPS[op], p.to(torch.float64))
    plain, fast = results(plain_low_precision(op), p), results(call(kernels, op), p)

    assert call(kernels, op)(p).dtype == dtype
    for name, value in exact.items():
        error_fast, error_plain = (torch.norm(found[name] - value) for found in (fast, plain))
        assert error_fast <= 2 * error_plain, name
        assert 0 < error_plain < 0.02 * torch.norm(value), "else this compares nothing"


# ------------------------------------------------------------------ the comparison can fail

MUTATIONS: dict[str, Callable[[Problem], Problem]] = {
    "expert_dropped": lambda p: replace(p, gates=p.gates * (p.index != 2)),
    "gate_scaled": lambda p: replace(p, gates=p.gates * torch.tensor([1.0, 1.001])),
    "gates_swapped": lambda p: replace(p, gates=p.gates.flip(1)),
    "experts_shifted": lambda p: replace(p, index=(p.index + 1) % len(p.lora_B)),
    "scaling_forgotten": lambda p: replace(p, scaling=torch.ones_like(p.scaling)),
    "A_of_another_expert": lambda p: replace(p, lora_A=p.lora_A.roll(1, 0)),
    "gate_detached": lambda p: replace(p, gates=p.gates.detach() + 0 * p.gates),
    "B_without_gradient_in_one_expert": lambda p: replace(
        p, lora_B=torch.cat([p.lora_B[:3], p.lora_B[3:].detach()])
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_found(mutation):
    right = call(BACKENDS["dense"], "lora_mix")
    assert_same(right, "lora_mix", CASES["usual"])
    with pytest.raises(AssertionError):
        assert_same(lambda p: right(MUTATIONS[mutation](p)), "lora_mix", CASES["usual"])


# ------------------------------------------------------------------ what else was promised


def test_reference_takes_an_input_of_its_own_for_every_expert():
    p = problem(K=4)
    x_ETD = torch.randn(4, 7, 6, dtype=torch.float64)
    found = BACKENDS["reference"].lora_mix(x_ETD, p.gates, p.index, p.lora_A, p.lora_B, p.scaling)
    expected = sum(
        loop_mix(replace(p, x=x_ETD[e], gates=p.gates * (p.index == e))) for e in range(4)
    )
    torch.testing.assert_close(found, expected)


def test_dense_keeps_only_the_intermediate_for_the_backward():
    p = problem(T=50)
    leaves = [t.requires_grad_() for t in (p.x, p.gates, p.lora_A, p.lora_B)]
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if all(tensor is not leaf for leaf in leaves):
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call(BACKENDS["dense"], "lora_mix")(p)

    tokens, experts, rank = 50, 4, 3
    slots = 2 * tokens  # the index of the scatter
    assert sum(saved.values()) <= tokens * experts * rank + tokens * experts + slots + experts


def test_a_second_derivative_of_the_dense_kernel_is_refused_not_wrong():
    p = problem()
    leaves = [t.requires_grad_() for t in (p.x, p.lora_A)]
    output = call(BACKENDS["dense"], "lora_mix")(p)
    (grad_x,) = torch.autograd.grad(output.pow(2).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(grad_x.sum(), leaves[1])

    output = call(BACKENDS["reference"], "lora_mix")(p)
    (grad_x,) = torch.autograd.grad(output.pow(2).sum(), leaves[0], create_graph=True)
    assert torch.autograd.grad(grad_x.sum(), leaves[1])[0].abs().max() > 0.1


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_found_by_its_name(name):
    assert backend(name) is BACKENDS[name]
    assert backend(name).name == name


@backends
@ops
def test_calls_are_counted_by_backend_while_somebody_asks(kernels, op):
    with count_calls() as calls:
        call(kernels, op)(CASES["usual"])
        call(kernels, op)(CASES["usual"])
    call(kernels, op)(CASES["usual"])
    assert calls == {(op, kernels.name): 2}


def test_auto_chooses_from_the_table_and_an_unknown_backend_is_refused():
    assert backend("auto").table == BACKENDS
    with pytest.raises(BackendError, match=r"'tritn' does not exist\. Known: auto, reference"):
        backend("tritn")

"""Every backend of every op, forward and backward, against loops over rows and experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molora.errors import BackendError
from molora.kernels import BACKENDS, Backend, backend

backends = pytest.mark.parametrize("kernels", BACKENDS.values(), ids=BACKENDS)
ops = pytest.mark.parametrize("op", ["lora_mix", "lora_rows"])


@dataclass(frozen=True)
class Problem:
    """Inputs of an op in float64; gates None: all experts act with gate 1."""

    x: Tensor
    gates: Tensor | None
    index: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """x in `dtype`; gates, factors and scaling in float32, as a mixture stores them."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gates = None if self.gates is None else self.gates.to(wide)
        A, B, scaling = (t.to(wide) for t in (self.lora_A, self.lora_B, self.scaling))
        return Problem(self.x.to(dtype), gates, self.index, A, B, scaling)


def problem(
    *,
    T: int = 7,
    D: int = 6,
    F: int = 5,
    E: int = 4,
    R: int = 3,
    K: int = 2,
    shared_A: bool = False,
    gated: bool = True,
    only: tuple[int, ...] = (),
    seed: int = 0,
) -> Problem:
    """Random inputs; E ≠ R and D ≠ F hide no transpose; `only` restricts the chosen experts."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    pool = torch.tensor(only or range(E))
    order_TE = torch.rand(T, len(pool), generator=source).argsort(dim=-1)
    index = pool[order_TE][:, :K]
    gates = torch.rand(T, K, generator=source, dtype=torch.float64) + 0.1
    return Problem(
        x=normal(T, D),
        gates=gates if gated else None,
        index=index if gated else None,
        lora_A=normal(1 if shared_A else E, R, D),
        lora_B=normal(E, F, R),
        scaling=torch.rand(E, generator=source, dtype=torch.float64) + 0.5,
    )


# ------------------------------------------------------------------ the oracle: loops in float64


def delta_of(p: Problem, row: int, expert: int) -> Tensor:
    A = p.lora_A[0 if len(p.lora_A) == 1 else expert]
    return p.scaling[expert] * (p.lora_B[expert] @ (A @ p.x[row]))


def no_rows(p: Problem, *shape: int) -> Tensor:
    """An empty output that still has (zero) gradients."""
    inputs = [p.x, p.lora_A, p.lora_B] + ([] if p.gates is None else [p.gates])
    return p.x.new_zeros(0, *shape) * torch.stack([t.sum() for t in inputs]).sum()


def loop_mix(p: Problem) -> Tensor:
    rows = [no_rows(p, p.lora_B.shape[1])]
    for t in range(len(p.x)):
        y_F = p.x.new_zeros(p.lora_B.shape[1])
        if p.gates is None:
            for e in range(len(p.lora_B)):
                y_F = y_F + delta_of(p, t, e)
        else:
            for gate, e in zip(p.gates[t], p.index[t].tolist(), strict=True):
                y_F = y_F + gate * delta_of(p, t, e)
        rows.append(y_F[None])
    return torch.cat(rows)


def loop_rows(p: Problem) -> Tensor:
    rows = [
        torch.stack([delta_of(p, t, e) for e in p.index[t].tolist()])[None] for t in range(len(p.x))
    ]
    return torch.cat([no_rows(replace(p, gates=None), p.index.shape[1], p.lora_B.shape[1]), *rows])


def call(kernels: Backend, op: str) -> Callable[[Problem], Tensor]:
    if op == "lora_mix":
        return lambda p: kernels.lora_mix(p.x, p.gates, p.index, p.lora_A, p.lora_B, p.scaling)
    return lambda p: kernels.lora_rows(p.x, p.index, p.lora_A, p.lora_B, p.scaling)


LOOPS = {"lora_mix": loop_mix, "lora_rows": loop_rows}


def results(run: Callable[[Problem], Tensor], p: Problem) -> dict[str, Tensor]:
    """The output, and the gradients for a fixed random gradient of the output, in float64."""
    names = ("x", "gates", "lora_A", "lora_B")
    leaves = {
        name: getattr(p, name).detach().clone().requires_grad_()
        for name in names
        if getattr(p, name) is not None
    }
    output = run(replace(p, **leaves))
    source = torch.Generator().manual_seed(99)
    upstream = torch.randn(output.shape, generator=source, dtype=torch.float64)
    output.backward(upstream.to(output.dtype))
    found = {"output": output.detach().double()}
    for name, leaf in leaves.items():  # ungated rows have no gradient for the gates
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype
            found[name] = leaf.grad.double()
    return found


def assert_same(
    run: Callable[[Problem], Tensor], op: str, p: Problem, *, tolerance: float = 1e-12
) -> None:
    found, expected = results(run, p), results(LOOPS[op], p.to(torch.float64))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


CASES: dict[str, Problem] = {
    "usual": problem(),
    "no_row": problem(T=0),
    "one_row": problem(T=1),
    "odd_rows": problem(T=13),
    "one_expert": problem(E=1, K=1),
    "all_experts": problem(K=4),
    "one_slot": problem(K=1),
    "expert_without_a_row": problem(only=(0, 2, 3)),
    "all_rows_on_one_expert": problem(K=1, only=(2,)),
    "shared_A": problem(shared_A=True),
    "shared_A_one_expert": problem(shared_A=True, E=1, K=1),
    "rank_1": problem(R=1),
    "gate_0": replace(problem(), gates=problem().gates * torch.tensor([1.0, 0.0])),
    "ungated": problem(gated=False),
    "ungated_shared_A": problem(gated=False, shared_A=True),
    "ungated_no_row": problem(gated=False, T=0),
}


@backends
@ops
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_loops(kernels, op, case):
    p = CASES[case]
    if p.gates is None and op == "lora_rows":  # rows are of chosen experts: choose them all
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
        seed=data.draw(st.integers(0, 2**31)),
    )
    assert_same(call(kernels, op), op, p)


@backends
@ops
@pytest.mark.parametrize("shared_A", [False, True], ids=["own_A", "shared_A"])
def test_gradcheck(kernels, op, shared_A):
    p = problem(T=3, shared_A=shared_A)
    run = call(kernels, op)
    names = ("x", "gates", "lora_A", "lora_B") if op == "lora_mix" else ("x", "lora_A", "lora_B")

    def of_leaves(*values: Tensor) -> Tensor:
        return run(replace(p, **dict(zip(names, values, strict=True))))

    leaves = [getattr(p, name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(of_leaves, leaves)


# ------------------------------------------------------------------ low precision


def plain_low_precision(op: str) -> Callable[[Problem], Tensor]:
    """What one would write without a kernel: expert by expert in the input's dtype."""

    def delta(p: Problem, e: int) -> Tensor:
        dtype = p.x.dtype
        A, B = p.lora_A[0 if len(p.lora_A) == 1 else e].to(dtype), p.lora_B[e].to(dtype)
        return p.scaling[e].to(dtype) * ((p.x @ A.T) @ B.T)

    def mix(p: Problem) -> Tensor:
        y_TF = torch.zeros(len(p.x), p.lora_B.shape[1], dtype=p.x.dtype)
        for e in range(len(p.lora_B)):
            gate_T = (p.gates * (p.index == e)).sum(dim=-1).to(p.x.dtype)
            y_TF = y_TF + gate_T[:, None] * delta(p, e)
        return y_TF

    def rows(p: Problem) -> Tensor:
        all_TEF = torch.stack([delta(p, e) for e in range(len(p.lora_B))], dim=1)
        return all_TEF.gather(1, p.index[:, :, None].expand(-1, -1, all_TEF.shape[-1]))

    return mix if op == "lora_mix" else rows


@backends
@ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared_A", [False, True], ids=["own_A", "shared_A"])
def test_error_in_low_precision_is_at_most_twice_that_of_plain_torch(kernels, op, dtype, shared_A):
    p = problem(T=65, D=48, F=40, E=6, R=4, K=2, shared_A=shared_A).to(dtype)
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


def test_auto_is_dense_and_an_unknown_backend_is_refused():
    assert backend("auto") is BACKENDS["dense"]
    with pytest.raises(BackendError, match=r"'tritn' does not exist\. Known: auto, reference"):
        backend("tritn")

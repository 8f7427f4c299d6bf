"""Inputs of the kernels' ops, what loops over rows and experts make of them, and how to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molora.kernels import BACKENDS, Backend
from molora.kernels.base import Base

RUNNABLE = {name: b for name, b in BACKENDS.items() if name != "triton"}
"""The backends that run on a CPU."""


@dataclass(frozen=True)
class Problem:
    """Inputs of an op in float64; gates None: all experts act with gate 1."""

    x: Tensor
    gates: Tensor | None
    index: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    base: Base | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        """x in `dtype`; gates, factors and scaling in float32, as a mixture stores them."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gates = None if self.gates is None else self.gates.to(wide)
        A, B, scaling = (t.to(wide) for t in (self.lora_A, self.lora_B, self.scaling))
        base = self.base
        if base is not None:
            bias = None if base.bias is None else base.bias.to(dtype)
            base = Base(base.weight.to(dtype), bias, base.transposed)
        return Problem(self.x.to(dtype), gates, self.index, A, B, scaling, base)


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
    base: str = "",
    seed: int = 0,
) -> Problem:
    """Random inputs; E ≠ R and D ≠ F hide no transpose; `only` restricts the chosen experts.

    `base` is of these letters: w, a frozen linear; b, with a bias; t, that keeps its weight (D, F).
    """
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    pool = torch.tensor(only or range(E))
    order_TE = torch.rand(T, len(pool), generator=source).argsort(dim=-1)
    index = pool[order_TE][:, :K]
    gates = torch.rand(T, K, generator=source, dtype=torch.float64) + 0.1
    shape = (D, F) if "t" in base else (F, D)
    linear = Base(normal(*shape), normal(F) if "b" in base else None, "t" in base)
    return Problem(
        x=normal(T, D),
        gates=gates if gated else None,
        index=index if gated else None,
        lora_A=normal(1 if shared_A else E, R, D),
        lora_B=normal(E, F, R),
        scaling=torch.rand(E, generator=source, dtype=torch.float64) + 0.5,
        base=linear if base else None,
    )


# ------------------------------------------------------------------ the oracle: loops in float64


def delta_of(p: Problem, row: int, expert: int) -> Tensor:
    A = p.lora_A[0 if len(p.lora_A) == 1 else expert]
    return p.scaling[expert] * (p.lora_B[expert] @ (A @ p.x[row]))


def no_rows(p: Problem, *shape: int) -> Tensor:
    """An empty output that still has (zero) gradients."""
    inputs = [p.x, p.lora_A, p.lora_B] + ([] if p.gates is None else [p.gates])
    return p.x.new_zeros(0, *shape) * torch.stack([t.sum() for t in inputs]).sum()


def base_of(p: Problem, row: int) -> Tensor:
    if p.base is None:
        return p.x.new_zeros(p.lora_B.shape[1])
    weight_FD = p.base.weight.T if p.base.transposed else p.base.weight
    y_F = weight_FD @ p.x[row]
    return y_F if p.base.bias is None else y_F + p.base.bias


def loop_mix(p: Problem) -> Tensor:
    rows = [no_rows(p, p.lora_B.shape[1])]
    for t in range(len(p.x)):
        y_F = base_of(p, t)
        if p.gates is None:
            for e in range(len(p.lora_B)):
                y_F = y_F + delta_of(p, t, e)
        else:
            chosen = range(len(p.lora_B)) if p.index is None else p.index[t].tolist()
            for gate, e in zip(p.gates[t], chosen, strict=True):
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
        return lambda p: kernels.lora_mix(
            p.x, p.gates, p.index, p.lora_A, p.lora_B, p.scaling, base=p.base
        )
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
    "gates_in_order": replace(problem(K=4), index=None),
    "gates_in_order_no_row": replace(problem(K=4, T=0), index=None),
    "gates_in_order_shared_A": replace(problem(K=4, shared_A=True, base="w"), index=None),
    "ungated": problem(gated=False),
    "ungated_shared_A": problem(gated=False, shared_A=True),
    "ungated_no_row": problem(gated=False, T=0),
    "base": problem(base="w"),
    "base_with_bias": problem(base="wb"),
    "base_transposed": problem(base="wt"),
    "base_transposed_with_bias": problem(base="wtb"),
    "base_shared_A": problem(base="wb", shared_A=True),
    "base_ungated": problem(base="w", gated=False),
    "base_no_row": problem(base="wb", T=0),
}


def plain_low_precision(op: str) -> Callable[[Problem], Tensor]:
    """What one would write without a kernel: expert by expert in the input's dtype."""

    def delta(p: Problem, e: int) -> Tensor:
        dtype = p.x.dtype
        A, B = p.lora_A[0 if len(p.lora_A) == 1 else e].to(dtype), p.lora_B[e].to(dtype)
        return p.scaling[e].to(dtype) * ((p.x @ A.T) @ B.T)

    def mix(p: Problem) -> Tensor:
        y_TF = torch.zeros(len(p.x), p.lora_B.shape[1], dtype=p.x.dtype)
        if p.base is not None:
            y_TF = p.base.product(p.x)
        for e in range(len(p.lora_B)):
            gate_T = (p.gates * (p.index == e)).sum(dim=-1).to(p.x.dtype)
            y_TF = y_TF + gate_T[:, None] * delta(p, e)
        return y_TF

    def rows(p: Problem) -> Tensor:
        all_TEF = torch.stack([delta(p, e) for e in range(len(p.lora_B))], dim=1)
        return all_TEF.gather(1, p.index[:, :, None].expand(-1, -1, all_TEF.shape[-1]))

    return mix if op == "lora_mix" else rows

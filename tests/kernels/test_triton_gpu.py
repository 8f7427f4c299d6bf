"""The triton kernels on a GPU: the comparisons that test_triton_interpreted.py makes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problems import CASES, Problem, assert_same, call, problem
from kernel_triton import LAYOUTS, assert_no_worse, for_op
from torch import Tensor

from molora.kernels import Backend, triton_bank
from molora.kernels.base import Base
from molora.kernels.lora_mix.triton_mix import lora_mix
from molora.kernels.lora_rows.triton_rows import lora_rows

pytestmark = pytest.mark.gpu

TRITON = Backend("triton", lora_mix, lora_rows)
ops = pytest.mark.parametrize("op", ["lora_mix", "lora_rows"])
layouts = pytest.mark.parametrize("layout", LAYOUTS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# what a step has, and shapes whose tiles are filled in part
LARGE: dict[str, Problem] = {
    "aligned": problem(T=300, D=256, F=512, E=8, R=8, base="wb"),
    "not_aligned": problem(T=301, D=251, F=127, E=7, R=5, K=3, base="wt"),
    "columns_of_several_blocks": problem(T=100, D=96, F=160, E=9, R=20),
    "rank_of_several_blocks": problem(T=70, D=96, F=64, E=2, R=140),
    "shared_A": problem(T=200, D=128, F=96, E=6, R=12, shared_A=True, base="wb"),
    "one_expert_has_all": problem(T=300, D=64, F=80, E=40, R=16, K=1, only=(3,)),
    "ungated": problem(T=200, D=128, F=96, E=6, R=12, gated=False, base="w"),
}


def on_gpu(op: str) -> Callable[[Problem], Tensor]:
    """The op on copies of the tensors there, with the result and its gradients brought back."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.cuda()
        if isinstance(value, Base):
            bias = None if value.bias is None else value.bias.cuda()
            return Base(value.weight.cuda(), bias, value.transposed)
        return value

    def run(p: Problem) -> Tensor:
        there = replace(p, **{f.name: moved(getattr(p, f.name)) for f in fields(p)})
        return call(TRITON, op)(there).cpu()

    return run


def layout_is(name: str) -> Any:
    return mock.patch.object(triton_bank, "sorting_pays", return_value=LAYOUTS[name])


@ops
@layouts
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_loops(op, layout, case):
    with layout_is(layout):
        p = for_op(op, CASES[case]).to(torch.float32)
        assert_same(on_gpu(op), op, p, tolerance=2e-5)


@ops
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_errors_are_at_most_twice_those_of_plain_torch(op, layout, dtype, case):
    with layout_is(layout):
        assert_no_worse(on_gpu(op), op, for_op(op, LARGE[case]), dtype)


@ops
@layouts
@settings(max_examples=20)
@given(data=st.data())
def test_any_shape_is_that_of_the_loops(op, layout, data):
    E = data.draw(st.integers(1, 9))
    p = problem(
        T=data.draw(st.integers(0, 150)),
        D=data.draw(st.integers(1, 100)),
        F=data.draw(st.integers(1, 100)),
        E=E,
        R=data.draw(st.sampled_from([1, 3, 8, 16, 20])),
        K=data.draw(st.integers(1, E)),
        shared_A=data.draw(st.booleans()),
        base=data.draw(st.sampled_from(["", "w", "wb", "wt", "wtb"])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    with layout_is(layout):
        assert_same(on_gpu(op), op, p.to(torch.float32), tolerance=1e-3)


@ops
@layouts
def test_results_are_the_same_bits_every_time(op, layout):
    p = LARGE["not_aligned"].to(torch.bfloat16)
    with layout_is(layout):
        first, *others = (on_gpu(op)(p) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


@ops
def test_nothing_waits_for_the_device(op):
    """A word to the host would be one for each linear of each layer."""
    p = problem(T=64, D=64, F=64, E=40, R=16).to(torch.bfloat16)
    p = replace(
        p, **{f.name: v.cuda() for f in fields(p) if isinstance(v := getattr(p, f.name), Tensor)}
    )
    leaves = [t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B)]
    call(TRITON, op)(p).sum().backward()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        call(TRITON, op)(p).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None for leaf in leaves)

"""Both groupings of the grouped backend, and what it promises beside what is held of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from host_reads import HostReads
from hypothesis import given
from hypothesis import strategies as st
from kernel_problems import (
    CASES,
    LOOPS,
    Problem,
    assert_same,
    call,
    plain_low_precision,
    problem,
    results,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from molora.kernels import BACKENDS
from molora.kernels.grouped_product import grouped_outer, grouped_product
from molora.kernels.plan import RowPlan, plan_rows

GROUPED = BACKENDS["grouped"]
groupings = pytest.mark.parametrize("grouping", ["slot", "set"])
ops = pytest.mark.parametrize("op", ["lora_mix", "lora_rows"])


def with_plan(op: str, make: Callable[[Problem], RowPlan], p: Problem) -> Tensor:
    plan = make(p)
    if op == "lora_rows":
        return GROUPED.lora_rows(p.x, p.index, p.lora_A, p.lora_B, p.scaling, plan=plan)
    return GROUPED.lora_mix(
        p.x, p.gates, p.index, p.lora_A, p.lora_B, p.scaling, base=p.base, plan=plan
    )


def grouped_by(grouping: str, op: str) -> Callable[[Problem], Tensor]:
    return partial(with_plan, op, lambda p: plan_rows(p.index, len(p.lora_B), grouping=grouping))


# ------------------------------------------------------------------ both groupings are the loops


@groupings
@ops
@pytest.mark.parametrize("case", [name for name, p in CASES.items() if p.index is not None])
def test_both_groupings_are_the_loops(grouping, op, case):
    run, p = grouped_by(grouping, op), CASES[case]
    assert_same(run, op, p)
    assert_same(run, op, p.to(torch.float32), tolerance=2e-5)


@groupings
@ops
@given(data=st.data())
def test_any_shape_is_that_of_the_loops(grouping, op, data):
    E = data.draw(st.integers(1, 5))
    p = problem(
        T=data.draw(st.integers(0, 9)),
        D=data.draw(st.integers(1, 9)),
        F=data.draw(st.integers(1, 9)),
        E=E,
        R=data.draw(st.integers(1, 5)),
        K=data.draw(st.integers(1, E)),
        shared_A=data.draw(st.booleans()),
        base=data.draw(st.sampled_from(["", "wb", "wt"])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    assert_same(grouped_by(grouping, op), op, p.to(torch.float32), tolerance=1e-4)


@groupings
@ops
@pytest.mark.parametrize("shared_A", [False, True], ids=["own_A", "shared_A"])
def test_gradcheck(grouping, op, shared_A):
    p = problem(T=4, E=3, shared_A=shared_A, base="" if op == "lora_rows" else "w")
    names = ("x", "gates", "lora_A", "lora_B") if op == "lora_mix" else ("x", "lora_A", "lora_B")

    def of_leaves(*values: Tensor) -> Tensor:
        return grouped_by(grouping, op)(replace(p, **dict(zip(names, values, strict=True))))

    assert torch.autograd.gradcheck(of_leaves, [getattr(p, n).requires_grad_() for n in names])


@groupings
@ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_low_precision_is_at_most_twice_that_of_plain_torch(grouping, op, dtype):
    p = problem(T=65, D=44, F=37, E=4, R=3, K=2, base="w" if op == "lora_mix" else "").to(dtype)
    exact = results(LOOPS[op], p.to(torch.float64))
    plain, fast = results(plain_low_precision(op), p), results(grouped_by(grouping, op), p)
    for name, value in exact.items():
        error_fast, error_plain = (torch.norm(found[name] - value) for found in (fast, plain))
        assert error_fast <= 2 * error_plain, name
        assert 0 < error_plain < 0.02 * torch.norm(value), "else this compares nothing"


@groupings
@ops
def test_the_gradient_of_a_sum_is_taken(grouping, op):
    """Its gradient is one number, expanded, which grouped_mm refuses."""
    p = problem(T=13).to(torch.float32)
    found = {}
    for name, run in {"grouped": grouped_by(grouping, op), "loops": LOOPS[op]}.items():
        leaves = [t.clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B)]
        run(replace(p, x=leaves[0], lora_A=leaves[1], lora_B=leaves[2])).sum().backward()
        found[name] = [leaf.grad for leaf in leaves]
    torch.testing.assert_close(found["grouped"], found["loops"], rtol=1e-4, atol=1e-4)


@groupings
@ops
def test_parameters_may_start_anywhere_in_a_shared_buffer(grouping, op, monkeypatch):
    """As ZeRO-1 keeps them; grouped_mm refuses odd addresses on a GPU, not on a CPU."""

    def checked(*operands: Tensor, offs: Tensor) -> Tensor:
        assert all(operand.data_ptr() % 16 == 0 for operand in operands)
        return torch.nn.functional.grouped_mm(*operands, offs=offs)

    def moved(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    def run(p: Problem) -> Tensor:
        return grouped_by(grouping, op)(replace(p, lora_A=moved(p.lora_A), lora_B=moved(p.lora_B)))

    monkeypatch.setattr("molora.kernels.grouped_product.grouped_mm", checked)
    p = problem(D=8, F=12, R=4).to(torch.float32)
    assert moved(p.lora_A).data_ptr() % 16 == 4
    found, expected = results(run, p), results(grouped_by(grouping, op), p)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ------------------------------------------------------------------ plans

WRONG: dict[str, Callable[[RowPlan], RowPlan]] = {
    "rows_shifted": lambda plan: replace(plan, order_N=plan.order_N.roll(1)),
    "slots_swapped": lambda plan: replace(plan, slot_NS=1 - plan.slot_NS),
    "group_longer": lambda plan: replace(plan, offsets_G=plan.offsets_G[[1, 2, 2]]),
    "experts_shifted": lambda plan: replace(plan, expert_NS=plan.expert_NS.roll(1, 0)),
}


@groupings
@ops
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_plan_gives_a_wrong_result(grouping, op, wrong):
    p = problem(T=20, E=3)

    def made(q: Problem) -> RowPlan:
        return WRONG[wrong](plan_rows(q.index, 3, grouping=grouping))

    assert_same(grouped_by(grouping, op), op, p)
    with pytest.raises(AssertionError):
        assert_same(partial(with_plan, op, made), op, p)


@ops
def test_a_plan_that_is_passed_gives_what_one_made_here_gives(op):
    p = problem(T=50, base="w" if op == "lora_mix" else "")
    passed = results(partial(with_plan, op, lambda q: plan_rows(q.index, len(q.lora_B))), p)
    made = results(call(GROUPED, op), p)
    assert passed.keys() == made.keys()
    assert all(torch.equal(passed[name], made[name]) for name in made)


# ------------------------------------------------------------------ cost


class Products(TorchDispatchMode):
    """Counts grouped products inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._grouped_mm.default
        return func(*args, **(kwargs or {}))


@groupings
@pytest.mark.parametrize(
    ("needed", "products"),
    [
        (("x", "gates", "lora_A", "lora_B"), 6),
        (("x",), 4),
        (("lora_A",), 4),
        (("gates",), 3),
        (("lora_B",), 3),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_what_needs_no_gradient_costs_none(grouping, needed, products):
    p = problem(T=12, E=3, base="w").to(torch.float32)
    leaves = {name: getattr(p, name).clone().requires_grad_() for name in needed}
    with Products() as counted:
        grouped_by(grouping, "lora_mix")(replace(p, **leaves)).square().sum().backward()
    assert counted.count == products
    assert all(leaf.grad is not None for leaf in leaves.values())


@groupings
@ops
def test_an_expert_without_rows_has_a_gradient_of_0(grouping, op):
    found = results(grouped_by(grouping, op), problem(only=(0, 2, 3)).to(torch.float32))
    for name in ("lora_A", "lora_B"):
        norms_E = found[name].flatten(1).norm(dim=1)
        assert norms_E[1] == 0
        assert norms_E[[0, 2, 3]].min() > 0


@groupings
@ops
def test_between_forward_and_backward_only_the_intermediate_and_the_plan_are_kept(grouping, op):
    T, E, K, R = 50, 4, 2, 3
    p = problem(T=T, E=E, K=K, R=R, base="w")
    leaves = [t.requires_grad_() for t in (p.x, p.gates, p.lora_A, p.lora_B)]
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if all(tensor is not leaf for leaf in (*leaves, p.base.weight)):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        grouped_by(grouping, op)(p)
    # in 8 bytes each: the intermediate, the scaling; order, slots and experts; groups
    plan = 3 * T * K + 6 * (K + 1)
    assert sum(saved.values()) <= 8 * (T * K * R + E + plan)
    parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    assert not parameters & saved.keys(), "a view of a parameter, which ZeRO-3 would keep whole"


@groupings
@ops
def test_nothing_is_read_on_the_host(grouping, op):
    reads, p = HostReads(), problem(T=12, base="w" if op == "lora_mix" else "")
    reads.counting(results)(grouped_by(grouping, op), p)
    assert reads.reads == []


@ops
def test_a_second_derivative_is_refused_not_wrong(op):
    p = problem()
    leaves = [t.requires_grad_() for t in (p.x, p.lora_A)]
    output = call(GROUPED, op)(p)
    (grad_x,) = torch.autograd.grad(output.pow(2).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(grad_x.sum(), leaves[1])


# ------------------------------------------------------------------ compilation


@ops
def test_one_graph_in_bfloat16_serves_every_routing(op):
    compiled = torch.compile(call(GROUPED, op), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    for seed in (0, 1):
        p = problem(T=9, R=4, base="w" if op == "lora_mix" else "", seed=seed).to(torch.bfloat16)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            found, expected = results(compiled, p), results(call(GROUPED, op), p)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_compiled_says_so_or_breaks_the_graph():
    p = problem().to(torch.float32)
    run = call(GROUPED, "lora_mix")
    with pytest.raises(
        Exception, match=r"torch\.compile cannot trace grouped_mm in torch\.float32"
    ):
        torch.compile(run, fullgraph=True, backend="aot_eager")(p)
    torch._dynamo.reset()
    assert_same(torch.compile(run, backend="aot_eager"), "lora_mix", p, tolerance=2e-5)


# ------------------------------------------------------------------ the products themselves


@given(data=st.data())
def test_products_are_those_of_each_group(data):
    inner, outer = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    N, G = sum(sizes), len(sizes)
    # small integers: exact in every dtype
    left_NI = torch.randint(-3, 4, (N, inner), generator=source).to(dtype)
    right_NO = torch.randint(-3, 4, (N, outer), generator=source).to(dtype)
    weights_GIO = torch.randint(-3, 4, (G, inner, outer), generator=source).to(dtype)
    offsets_G = torch.tensor(sizes).cumsum(0).to(torch.int32)

    parts = list(zip(left_NI.split(sizes), right_NO.split(sizes), weights_GIO, strict=True))
    product_NO = torch.cat([left @ weight for left, _, weight in parts])
    outer_GIO = torch.stack([left.T @ right for left, right, _ in parts])
    assert torch.equal(grouped_product(left_NI, weights_GIO, offsets_G), product_NO)
    assert torch.equal(grouped_outer(left_NI, right_NO, offsets_G), outer_GIO)
    transposed = weights_GIO.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(grouped_product(left_NI, transposed, offsets_G), product_NO)

"""The triton kernels, run by triton's interpreter on the CPU, against loops in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problems import CASES, Problem, assert_same, call, problem
from kernel_triton import (
    KERNELS,
    LAYOUTS,
    Interpreted,
    assert_no_worse,
    for_op,
    interpreted,
    load,
)

ops = pytest.mark.parametrize("op", ["lora_mix", "lora_rows"])
layouts = pytest.mark.parametrize("layout", LAYOUTS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# the rest of the table of cases and dtypes takes a minute
QUICK = {
    ("shared_A", torch.float16),
    ("several_tiles", torch.bfloat16),
    ("columns_of_several_blocks", torch.float32),
    ("rank_of_several_blocks", torch.float16),
    ("one_expert_has_all", torch.bfloat16),
}

# shapes around what a tile holds: 32 or 64 rows, 16 to 128 columns, 32 to 128 places
LARGE: dict[str, Problem] = {
    "several_tiles": problem(T=130, D=70, F=131, E=3, R=3),
    "rows_of_a_tile": problem(T=64, D=64, F=128, E=3, R=16),
    "one_row_more": problem(T=65, D=33, F=17, E=5, R=4),
    "columns_of_several_blocks": problem(T=40, D=40, F=48, E=9, R=20),
    "rank_of_several_blocks": problem(T=20, D=24, F=40, E=2, R=140),
    "rank_of_several_blocks_all_experts": problem(T=20, D=24, F=40, E=3, R=140, K=3),
    "many_experts": problem(T=20, D=24, F=20, E=12, R=2, K=3),
    "shared_A": problem(T=70, D=40, F=20, E=6, R=12, shared_A=True, base="wb"),
    "one_expert_has_all": problem(T=150, D=20, F=24, E=4, R=5, K=1, only=(3,), base="wt"),
    "all_experts": problem(T=70, D=24, F=40, E=4, R=8, K=4),
    "ungated": problem(T=70, D=40, F=20, E=6, R=12, gated=False, base="w"),
}


@ops
@layouts
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_loops(op, layout, case):
    kernels, p = interpreted(), for_op(op, CASES[case])
    with kernels.layout(layout):
        assert_same(call(kernels.backend, op), op, p.to(torch.float32), tolerance=2e-5)


@ops
@layouts
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[] if (case, dtype) in QUICK else pytest.mark.slow)
        for case in LARGE
        for dtype in DTYPES
    ],
)
def test_errors_are_at_most_twice_those_of_plain_torch(op, layout, dtype, case):
    kernels, p = interpreted(), for_op(op, LARGE[case])
    with kernels.layout(layout):
        assert_no_worse(call(kernels.backend, op), op, p, dtype)


def shapes(data: st.DataObject) -> Problem:
    E = data.draw(st.integers(1, 5))
    return problem(
        T=data.draw(st.integers(0, 40)),
        D=data.draw(st.integers(1, 40)),
        F=data.draw(st.integers(1, 40)),
        E=E,
        R=data.draw(st.integers(1, 20)),
        K=data.draw(st.integers(1, E)),
        shared_A=data.draw(st.booleans()),
        gated=data.draw(st.booleans()),
        base=data.draw(st.sampled_from(["", "w", "wb", "wt", "wtb"])),
        seed=data.draw(st.integers(0, 2**31)),
    )


def assert_any_shape(op: str, layout: str, data: st.DataObject) -> None:
    kernels, p = interpreted(), for_op(op, shapes(data))
    with kernels.layout(layout):
        assert_same(call(kernels.backend, op), op, p.to(torch.float32), tolerance=1e-3)


@ops
@layouts
@settings(max_examples=4)
@given(data=st.data())
def test_any_shape_is_that_of_the_loops(op, layout, data):
    assert_any_shape(op, layout, data)


@pytest.mark.slow
@ops
@layouts
@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_of_many_is_that_of_the_loops(op, layout, data):
    assert_any_shape(op, layout, data)


@ops
@layouts
def test_results_are_the_same_bits_every_time(op, layout):
    kernels, p = interpreted(), LARGE["shared_A"].to(torch.float32)
    with kernels.layout(layout):
        first, second = (call(kernels.backend, op)(p) for _ in range(2))
    assert torch.equal(first, second)


@ops
def test_both_layouts_are_taken_where_they_pay(op):
    kernels = interpreted()
    few, many = problem(E=4, R=3), problem(E=40, R=16)
    bank = kernels.modules["triton_bank"]
    for p, is_sorted in ((few, False), (many, True)):
        x, A, B = (t.float() for t in (p.x, p.lora_A, p.lora_B))
        found = bank._layout(x, p.index, A, B, None, summed=op == "lora_mix")
        assert (found.up.order is not None) is is_sorted
        assert_same(call(kernels.backend, op), op, p.to(torch.float32), tolerance=1e-4)


def test_projections_that_share_a_decision_sort_its_rows_once():
    kernels, p = interpreted(), problem(T=20).to(torch.float32)
    factors = (p.lora_A, p.lora_B, p.scaling)
    rows = kernels.modules["triton_rows"]
    plan = rows.SharedRows(p.index, 4)
    with kernels.layout("sorted"), pytest.MonkeyPatch.context() as patch:
        expected = kernels.backend.lora_mix(p.x, p.gates, p.index, *factors)
        sort, sorts = rows.sorted_by_expert, []
        patch.setattr(rows, "sorted_by_expert", lambda *a: sorts.append(a) or sort(*a))
        for _ in range(2):
            found = kernels.backend.lora_mix(p.x, p.gates, p.index, *factors, plan=plan)
            assert torch.equal(found, expected)
        kernels.backend.lora_rows(p.x, p.index, *factors, plan=plan)
    assert len(sorts) == 1


# ------------------------------------------------------------------ what is kept and computed


@layouts
def test_only_the_intermediate_and_the_order_are_kept_for_the_backward(layout):
    kernels, p = interpreted(), problem(T=50, D=30, F=20, base="wb").to(torch.float32)
    names = ("x", "gates", "lora_A", "lora_B")
    given_ = [getattr(p, name).requires_grad_() for name in names]
    given_ += [p.index, p.scaling, p.base.weight]
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if all(tensor is not other for other in given_):
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with kernels.layout(layout), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        call(kernels.backend, "lora_mix")(p)
    tokens, experts, rank, slots = 50, 4, 3, 2
    if layout == "sorted":  # the slots in order, and 3 numbers a tile
        tiles = 3 * slots * (tokens // 16 + experts)
        assert sum(saved.values()) == slots * tokens * (rank + 1) + tiles + slots * (experts + 1)
    else:
        assert sum(saved.values()) == tokens * experts * rank


@layouts
@ops
def test_what_is_frozen_has_no_gradient_and_no_launch(op, layout):
    kernels, p = interpreted(), problem(T=5).to(torch.float32)
    programs = kernels.modules["triton_programs"]
    launched = []

    class Noted:
        def __init__(self, name):
            self.name, self.program = name, getattr(programs, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.program[grid]

    p.lora_B.requires_grad_()
    with kernels.layout(layout), pytest.MonkeyPatch.context() as patch:
        y = call(kernels.backend, op)(p)
        for name in ("narrow", "widen", "outer"):
            patch.setattr(programs, name, Noted(name))
        y.sum().backward()
    assert launched == ["outer"]
    assert p.lora_B.grad is not None
    assert p.x.grad is None


def test_a_second_derivative_is_refused_not_wrong():
    kernels, p = interpreted(), problem().to(torch.float32)
    leaves = [t.requires_grad_() for t in (p.x, p.lora_A)]
    output = call(kernels.backend, "lora_mix")(p)
    (grad_x,) = torch.autograd.grad(output.pow(2).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(grad_x.sum(), leaves[1])


# ------------------------------------------------------------------ wrong kernels are found

PROGRAMS, LAUNCH, ROWS = "triton_programs", "triton_launch", "triton_rows"
MUTATIONS = {
    "expert_dropped": (PROGRAMS, "(experts < E) & (ranks", "(experts < E - 1) & (ranks"),
    "rank_dropped": (PROGRAMS, "exist = ranks < R\n", "exist = ranks < R - 1\n"),
    "gate_scaled": (PROGRAMS, "values.to(tl.float32)[", "(1.001 * values.to(tl.float32))["),
    "scaling_of_another": (PROGRAMS, "gates.scaling + experts", "gates.scaling + 0 * experts"),
    "gates_gradient_scaled": (PROGRAMS, "(tl.float32) * sums,", "(tl.float32) * 1.001 * sums,"),
    "A_of_another": (PROGRAMS, "tl.load(slots.tiles + 3 * tile)", "0 * tile"),
    "row_of_a_tile_dropped": (PROGRAMS, "3 * tile + 2)", "3 * tile + 2) - 1"),
    "rows_counted_twice": (PROGRAMS, "* tl.num_programs(2)", "* 1"),
    "base_subtracted": (PROGRAMS, "sums += tl.load(out_at", "sums -= tl.load(out_at"),
    "slots_swapped": (ROWS, "order_KT * slots + list_K1", "order_KT * slots + 1 - list_K1"),
    "a_turn_overwrites": (LAUNCH, "ADD=add or turn > 0", "ADD=add"),
    "a_part_is_lost": (LAUNCH, "sums.sum(dim=0)", "sums[0]"),
}
TELLING = [
    problem(T=70, E=4, R=3, D=20, F=24, base="w", seed=1),
    problem(T=9, E=3, R=2, seed=2),
]


def holds(kernels: Interpreted, layout: str) -> bool:
    run = call(kernels.backend, "lora_mix")
    with kernels.layout(layout):
        try:
            for p in TELLING:
                assert_same(run, "lora_mix", p.to(torch.float32), tolerance=1e-4)
        except AssertionError:
            return False
    return True


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_found(mutation, tmp_path: Path):
    name, right, wrong = MUTATIONS[mutation]
    text = (KERNELS / f"{name}.py").read_text(encoding="utf-8")
    assert text.count(right) == 1
    mutant = load({name: text.replace(right, wrong)}, tmp_path)
    assert not all(holds(mutant, layout) for layout in LAYOUTS)


def test_the_right_kernel_passes_where_the_wrong_ones_are_found(tmp_path: Path):
    text = (KERNELS / "triton_programs.py").read_text(encoding="utf-8")
    same = load({"triton_programs": text}, tmp_path)
    assert all(holds(same, layout) for layout in LAYOUTS)

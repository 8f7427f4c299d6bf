"""How rows are sorted into tiles, what triton is asked for, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_problems import call, problem
from kernel_triton import for_op, interpreted

from molora.errors import BackendError
from molora.kernels import Backend
from molora.kernels.lora_mix.triton_mix import lora_mix
from molora.kernels.lora_rows.triton_rows import lora_rows
from molora.kernels.triton_bank import sorting_pays
from molora.kernels.triton_rows import sorted_by_expert
from molora.kernels.triton_tiles import rows_of

TRITON = Backend("triton", lora_mix, lora_rows)
ops = pytest.mark.parametrize("op", ["lora_mix", "lora_rows"])


@given(data=st.data())
def test_every_slot_is_in_one_tile_of_its_expert_and_list(data):
    E = data.draw(st.integers(1, 9))
    T, K = data.draw(st.integers(0, 200)), data.draw(st.integers(1, E))
    only = data.draw(st.sets(st.integers(0, E - 1), min_size=K))
    index_TK = problem(T=T, E=E, K=K, only=tuple(only)).index
    rows = sorted_by_expert(index_TK, E, torch.bfloat16)

    assert rows.count == T * K
    found = []
    for number, tiles_M3 in enumerate(rows.tiles.tolist()):
        for expert, first, last in tiles_M3:
            members = rows.order[first : min(last, first + rows.block)].tolist()
            assert {slot % K for slot in members} <= {number}
            assert {index_TK.flatten()[slot].item() for slot in members} <= {expert}
            assert members == sorted(members)
            found += members
    assert sorted(found) == list(range(T * K))

    for number, starts in enumerate(rows.starts.tolist()):
        assert (starts[0], starts[-1]) == (number * T, (number + 1) * T)
        counts = torch.tensor(starts).diff()
        expected = torch.bincount(index_TK[:, number], minlength=E)
        assert torch.equal(counts, expected)


@pytest.mark.parametrize(
    ("rows", "low", "wide"), [(0, 16, 16), (1, 16, 16), (17, 32, 32), (33, 64, 32), (9999, 64, 32)]
)
def test_a_tile_has_as_many_rows_as_there_are_within_its_bounds(rows, low, wide):
    assert rows_of(rows, torch.bfloat16) == rows_of(rows, torch.float16) == low
    assert rows_of(rows, torch.float32) == wide


def test_rows_are_sorted_where_there_are_many_experts_and_few_slots():
    for how in ({"summed": True}, {"summed": False}):
        assert not sorting_pays(8, 8, 2, **how)
        assert sorting_pays(64, 16, 2, **how)

    assert not sorting_pays(64, 16, 64, summed=True)  # all of them: nothing to leave out
    assert sorting_pays(64, 8, 2, summed=True, flops_per_byte=125)
    assert not sorting_pays(64, 8, 2, summed=True, flops_per_byte=235)


@ops
def test_a_cpu_tensor_is_refused_without_the_interpreter(op):
    p = for_op(op, problem()).to(torch.float32)
    message = (
        r"backend='triton' runs on CUDA and ROCm devices, and this tensor is on 'cpu'\. "
        r"Use backend='dense' or 'reference' there"
    )
    with pytest.raises(BackendError, match=message):
        call(TRITON, op)(p)


@ops
def test_float64_is_refused(op):
    with pytest.raises(BackendError, match=r"float16 and float32, not torch\.float64\. Use"):
        call(interpreted().backend, op)(for_op(op, problem()))


def test_without_triton_the_error_says_so(monkeypatch):
    from molora.kernels import triton_launch

    def absent() -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(triton_launch, "_programs", absent)
    message = r"needs triton \(No module named 'triton'\)\. Use backend='dense'"
    with pytest.raises(BackendError, match=message):
        call(TRITON, "lora_mix")(problem().to(torch.float32))


def test_the_environment_alone_runs_the_kernels_on_the_cpu_and_nothing_imports_triton_before():
    code = """
import sys, torch
from molora.kernels.lora_mix import dense, triton_mix
assert "triton" not in sys.modules
x, gates, index = torch.randn(20, 8), torch.rand(20, 2), torch.rand(20, 4).argsort(1)[:, :2]
A, B, scaling = torch.randn(4, 3, 8), torch.randn(4, 5, 3), torch.ones(4)
for dtype in (torch.float32, torch.bfloat16):
    found, expected = (
        f.lora_mix(x.to(dtype), gates, index, A, B, scaling) for f in (triton_mix, dense)
    )
    assert "triton" in sys.modules
    assert expected.norm() > 1
    assert (found - expected).norm() < 0.02 * expected.norm()
"""
    root = Path(__file__).parents[2]
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)

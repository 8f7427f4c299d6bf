"""What the kernels' binaries need of every target, read from the binaries; no GPU is asked."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
LOW, WIDE = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        module = importlib.import_module("kernels_compiled")
    finally:
        sys.path.remove(str(BENCHMARKS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield module


def assert_fits(compiled: ModuleType, case: object, name: str) -> None:
    target = compiled.TARGETS[name]
    launches = {compiled.binary(one): one for one in compiled.launches_of(case, target)}
    assert {launch.program for launch in launches.values()} == {"narrow", "widen", "outer"}
    for launch in launches.values():
        needs = compiled.needs(launch, target)
        assert needs.spilled == 0, (str(case), launch.program, needs)
        assert needs.shared <= target.shared_memory, (str(case), launch.program, needs)
        assert 0 < needs.registers <= 512 if name == "gfx942" else 255
        assert needs.registers * needs.threads <= 2 ** (17 if name == "gfx942" else 16)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_spills(compiled, name):
    assert_fits(compiled, compiled.Case("lora_mix", LOW, 8, 8), name)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_nothing_spills_with_rows_sorted(compiled, name):
    assert_fits(compiled, compiled.Case("lora_mix", LOW, 64, 16), name)


MORE = [
    *((op, dtype, E, R, {}) for op in ("lora_mix", "lora_rows") for dtype in (LOW, WIDE)
      for E, R in ((8, 8), (8, 16), (64, 8), (64, 16), (4, 4), (8, 32), (16, 64))),
    *(("lora_mix", LOW, E, R, how) for E, R, how in (
        (1, 64, {"slots": 1}),
        (8, 8, {"tokens": 1}),
        (64, 16, {"tokens": 33}),
        (8, 8, {"shared_A": True}),
        (64, 16, {"shared_A": True}),
        (8, 8, {"gated": False}),
        (8, 16, {"slots": 8}),
        (64, 16, {"slots": 64}),
        (64, 8, {"slots": 64}),
        (32, 8, {"slots": 32}),
        (8, 8, {"base": False}),
        (3, 5, {"width": 100, "tokens": 100}),
    )),
    ("lora_mix", torch.float16, 8, 8, {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_spills_for_any_use(compiled, name):
    for op, dtype, E, R, how in MORE:
        assert_fits(compiled, compiled.Case(op, dtype, E, R, **how), name)


@pytest.mark.parametrize("name", TARGETS)
def test_a_program_that_is_too_large_is_seen_to_spill(compiled, name):
    target = compiled.TARGETS[name]
    narrow, *_ = compiled.launches_of(compiled.Case("lora_mix", LOW, 32, 16, slots=32), target)
    large = {"BLOCK_M": 256, "BLOCK_P": 128, "BLOCK_D": 16, "num_warps": 4}
    if name == "gfx942":  # has more registers
        large = {"BLOCK_M": 128, "BLOCK_P": 128, "num_warps": 1}
    assert compiled.needs(narrow, target).spilled == 0
    needs = compiled.needs(replace(narrow, arguments={**narrow.arguments, **large}), target)
    assert needs.spilled > 0


def test_shared_memory_grows_with_the_stages_of_a_program(compiled):
    target = compiled.TARGETS["sm_80"]
    narrow, *_ = compiled.launches_of(compiled.Case("lora_mix", LOW, 8, 16), target)
    more = replace(narrow, arguments={**narrow.arguments, "num_stages": 16})
    assert compiled.needs(narrow, target).shared < target.shared_memory
    assert compiled.needs(more, target).shared > target.shared_memory


def test_a_device_would_be_launched_with_what_was_compiled(compiled):
    """The recorded launches are all that there is, in the order of the two passes."""
    case = compiled.Case("lora_mix", LOW, 8, 8)
    nvidia, amd = (compiled.launches_of(case, compiled.TARGETS[n]) for n in ("sm_80", "gfx942"))
    names = ["narrow", "widen", "outer", "narrow", "outer", "widen"]
    assert [launch.program for launch in nvidia] == names
    assert [launch.program for launch in amd] == names
    assert "maxnreg" in nvidia[0].arguments
    assert "maxnreg" not in amd[0].arguments  # HIP refuses it
    assert len({compiled.binary(launch) for launch in nvidia}) == len(names)


def test_the_table_of_the_page_is_of_these_binaries(compiled):
    table = json.loads((BENCHMARKS / "kernels.json").read_text(encoding="utf-8"))
    rows = [row for row in table["rows"] if row["target"] == "sm_90" and row["case"] == 0]
    assert all(row["spilled"] == row["scalars"] == 0 for row in table["rows"])
    target = compiled.TARGETS["sm_90"]
    case = compiled.Case("lora_mix", LOW, 8, 8)
    for row, launch in zip(rows, compiled.launches_of(case, target), strict=True):
        needs = compiled.needs(launch, target)
        assert row["program"] == launch.program
        if table["triton"] == triton.__version__:
            assert (row["registers"], row["shared"]) == (needs.registers, needs.shared)

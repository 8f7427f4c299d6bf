"""benchmarks/machine.py: its arithmetic, by a clock that is told the time."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def machine() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.delitem(sys.modules, "machine", raising=False)
        return importlib.import_module("machine")


def ticking(*durations: float) -> Callable[[], float]:
    """A clock on which the timed products take these times, over and over."""
    times = itertools.accumulate(itertools.chain.from_iterable((0, d) for d in durations))
    return iter(list(times)).__next__


def test_rate_is_operations_over_the_fastest_repeat(machine: ModuleType) -> None:
    clock = ticking(3.0, 2.0, 5.0)
    assert machine.gemm_rate([(4, 8, 16)], repeats=3, clock=clock) == 2 * 4 * 8 * 16 / 2.0


def test_twice_the_operations_in_the_same_time_is_twice_the_rate(machine: ModuleType) -> None:
    once = machine.gemm_rate([(4, 8, 16)], repeats=1, clock=ticking(2.0))
    assert machine.gemm_rate([(4, 8, 32)], repeats=1, clock=ticking(2.0)) == 2 * once
    assert machine.gemm_rate([(4, 8, 16)], repeats=1, clock=ticking(4.0)) == once / 2


def test_products_weigh_by_their_number_and_are_measured_once(machine: ModuleType) -> None:
    small, large = (2, 4, 4), (2, 4, 8)
    rate = machine.gemm_rate([small, small, large], repeats=1, clock=ticking(1.0, 3.0))
    assert rate == (2 * 64 + 128) / (2 * 1.0 + 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_machine_has_a_rate(machine: ModuleType, dtype: torch.dtype) -> None:
    assert machine.gemm_rate([(8, 16, 16)], dtype, repeats=2) > 0


@pytest.mark.parametrize(("products", "repeats"), [([], 3), ([(1, 1, 1)], 0)])
def test_nothing_to_measure_is_an_error(
    machine: ModuleType, products: list[tuple[int, int, int]], repeats: int
) -> None:
    with pytest.raises(ValueError, match="needs a product and a repeat"):
        machine.gemm_rate(products, repeats=repeats)


def test_every_linear_of_a_model_is_a_product(machine: ModuleType) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    assert machine.linear_products(model, 7) == [(7, 3, 5), (7, 5, 2)]


def test_a_step_at_the_rate_of_the_machine_is_at_the_floor(machine: ModuleType) -> None:
    assert machine.fraction_of_floor(200, rate=100, seconds=2.0) == 1.0
    assert machine.fraction_of_floor(200, rate=100, seconds=4.0) == 0.5

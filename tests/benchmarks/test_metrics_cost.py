"""benchmarks/metrics_cost.py: what it counts does not grow with the model, and its times add up."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def metrics_cost() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.delitem(sys.modules, "step_cost", raising=False)
        return importlib.import_module("metrics_cost")


def operations(metrics_cost: ModuleType, folder: Path, layers: int) -> int:
    """ATen calls that watching one step adds to it."""
    sizes = metrics_cost.Sizes(hidden=64, layers=layers, tokens=32, vocab=64)
    run, counts = metrics_cost.Run(sizes, folder, logging_steps=10), []
    for watched in (True, False):
        run.step(watched=watched)
        with metrics_cost.OpCounter() as ops:
            run.step(watched=watched)
        counts.append(ops.count)
    return int(counts[0] - counts[1])


def test_operations_do_not_grow_with_the_number_of_sites(
    metrics_cost: ModuleType, tmp_path: Path
) -> None:
    few, many = (operations(metrics_cost, tmp_path, layers) for layers in (1, 3))
    assert 20 < few == many < 100


def test_a_run_measures_steps_and_lines(metrics_cost: ModuleType) -> None:
    sizes = metrics_cost.Sizes(hidden=64, layers=1, tokens=64, vocab=64)
    cost = metrics_cost.measure(sizes, 1, logging_steps=2)
    assert cost.sites == 7
    assert 0 < cost.watching_ms < cost.step_ms
    assert cost.line_ms > 0
    whole = (cost.watching_ms + cost.line_ms / 2) / cost.step_ms
    assert cost.share == pytest.approx(whole, rel=0.05)

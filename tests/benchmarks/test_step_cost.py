"""The figures of benchmarks/step_cost.py that do not depend on the machine: operations and saved
bytes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def step_cost() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("step_cost")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def costs(step_cost: ModuleType) -> dict[str, object]:
    sizes = step_cost.Sizes(hidden=128, layers=2, tokens=256, vocab=512)
    names = ["peft-lora-64", "lora-64", "molora-soft", "mola-top2"]
    return {cost.name: cost for cost in step_cost.measure(names, sizes, runs=1)}


def test_lora_preset_has_the_operations_of_peft_lora(costs: dict[str, object]) -> None:
    ours, peft = costs["lora-64"], costs["peft-lora-64"]
    assert ours.flops_x == peft.flops_x
    assert ours.saved_x <= peft.saved_x


def test_soft_mixture_of_8_rank_8_costs_little_more_than_lora_of_rank_64(
    costs: dict[str, object],
) -> None:
    # the router adds E / (E · R) = 1/8 to the down-projections; nothing may grow beyond that
    mixture, lora = costs["molora-soft"], costs["lora-64"]
    assert 0 < mixture.flops_x - lora.flops_x < 0.2 * (lora.flops_x - 1)
    assert mixture.saved_x < 1.02 * lora.saved_x


def test_two_of_eight_experts_cost_less_than_all(costs: dict[str, object]) -> None:
    mixture, lora = costs["mola-top2"], costs["lora-64"]
    # a quarter of the experts, and the router
    assert 0 < mixture.flops_x - 1 < 0.5 * (lora.flops_x - 1)
    assert mixture.saved_x < lora.saved_x


def test_saved_bytes_counts_a_storage_once(step_cost: ModuleType) -> None:
    import torch

    x = torch.randn(64, 8, requires_grad=True)

    def step() -> None:
        y = x.exp()  # saves its result
        (y * y.view(-1).view(64, 8)).sum().backward()  # saves the same storage twice more

    assert step_cost.saved_bytes(step) == 64 * 8 * 4

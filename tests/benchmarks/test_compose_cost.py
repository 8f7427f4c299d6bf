"""benchmarks/compose.py: every router is measured beside the base and package peft's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
LENGTHS = {"prompt": 6, "new_tokens": 3}


@pytest.fixture(scope="module")
def compose() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in ("compose", "step_cost"):
            patch.delitem(sys.modules, name, raising=False)
        return importlib.import_module("compose")


@pytest.fixture(scope="module")
def sizes(compose: ModuleType) -> object:
    return compose.Sizes(hidden=64, layers=2, tokens=32, vocab=64)


@pytest.mark.parametrize("figure", ["forward", "step", "decode"])
def test_every_figure_is_a_ratio_to_the_base_and_to_peft(
    figure: str, compose: ModuleType, sizes: object
) -> None:
    names = ["xlora"] if figure == "step" else ["arrow", "xlora", "spectr"]
    costs = list(compose.measure(figure, names, 5, sizes, runs=1, **LENGTHS))
    assert [cost.name for cost in costs] == names
    assert all(cost.base_x > 0 and cost.milliseconds > 0 for cost in costs)
    assert [cost.peft_x is not None for cost in costs] == [name != "spectr" for name in names]


def test_the_adapters_differ_and_both_libraries_read_them(
    compose: ModuleType, sizes: object, tmp_path: Path
) -> None:
    adapters = compose.write_adapters(tmp_path, 5, sizes)
    ids_BS = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(0))
    base = compose.base_model(sizes).eval()
    ours, theirs = (build(sizes, adapters) for build in compose.ROUTERS["arrow"])
    with torch.no_grad():
        expected, found, plain = (model(ids_BS).logits for model in (theirs, ours, base))
    # package peft's directions come from a power iteration that has not converged
    assert (found - expected).norm() < 0.5 * (found - plain).norm()
    assert len({(path / "adapter_model.safetensors").read_bytes() for path in adapters}) == 5


def test_decoding_makes_the_tokens_it_says(compose: ModuleType, sizes: object) -> None:
    ids_BS = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    run = compose.decode(6, 3)(compose.base_model(sizes).eval(), ids_BS)
    assert run().shape == (1, 9)

"""What a run on two processes says of itself is what one process with all rows says; B-36."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import launch
from seeing import reports_of, trainer_in

STAGES = ["none", "0", "1", "2", "3", "2-offload", "3-offload"]
# rounding of sums in another order, after three steps
CLOSE = 3e-4

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trainer = trainer_in(tmp_path_factory.mktemp("alone"), rows_per_process=8)
    (report,) = reports_of(trainer)
    (line,) = (line for line in trainer.state.log_history if "loss" in line)
    return {"report": report, "line": line}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(Path(__file__).with_name("seeing_ranks.py"), folder / "found.json", folder, *STAGES)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_of_two_processes_are_those_of_one(
    stage: str, results: dict[str, Any], alone: dict[str, Any]
) -> None:
    found = results[stage]
    assert found["partitioned"] == stage.startswith("3")
    (report,) = found["reports"]
    expected = alone["report"]
    for name, value in expected["totals"].items():
        if name not in ("tokens_per_second", "memory_mib"):
            assert report["totals"][name] == pytest.approx(value, rel=CLOSE), name
    assert report["sites"].keys() == expected["sites"].keys()
    for site, numbers in expected["sites"].items():
        for name, value in numbers.items():
            assert report["sites"][site][name] == pytest.approx(value, rel=CLOSE), (site, name)
    (line,) = found["lines"]
    assert line["grad_norm"] == pytest.approx(alone["line"]["grad_norm"], rel=CLOSE)
    assert line["loss"] == pytest.approx(alone["line"]["loss"], rel=CLOSE)
    whole = math.hypot(line["expert_grad_norm"], line["router_grad_norm"])
    assert whole == pytest.approx(line["grad_norm"], rel=1e-5)
    assert line["grad_norm"] > 1  # it was clipped


@pytest.mark.parametrize("stage", STAGES)
def test_the_agreement_of_the_ranks_is_that_of_their_own_counts(
    stage: str, results: dict[str, Any], alone: dict[str, Any]
) -> None:
    (report,), by_rank = results[stage]["reports"], results[stage]["counts"]
    for site, numbers in report["sites"].items():
        counts_WE = torch.tensor([counts[site] for counts in by_rank], dtype=torch.float64)
        shares_WE = counts_WE / counts_WE.sum(dim=1, keepdim=True)
        of_all_E = counts_WE.sum(dim=0) / counts_WE.sum()
        distance = 0.5 * (shares_WE - of_all_E).abs().sum(dim=1).max().item()
        assert numbers["agreement"] == pytest.approx(1 - distance)
    least = min(numbers["agreement"] for numbers in report["sites"].values())
    assert report["totals"]["rank_agreement"] == least < 0.97
    assert "rank_agreement" not in alone["report"]["totals"]


def test_one_ranks_own_numbers_would_be_noticed(
    results: dict[str, Any], alone: dict[str, Any]
) -> None:
    counts = results["none"]["counts"]
    for site, numbers in alone["report"]["sites"].items():
        loads = [torch.tensor(c[site]) * 4 / sum(c[site]) for c in counts]
        assert all((load - torch.tensor(numbers["load"])).abs().max() > CLOSE for load in loads)

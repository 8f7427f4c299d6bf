"""Runs on two processes that are interrupted and go on, under each ZeRO stage; B-22, B-23."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import launch
from resumable import everything, logged, trainer_in
from tiny_models import tiny

import molora
from molora.io import newest_complete
from molora.train import SFTTrainer

SCRIPT = Path(__file__).with_name("resume_ranks.py")
EVEN = {"mixture": {"dropout": 0.0}}
# rounding of sums in another order, after a dozen steps
CLOSE = 1e-4

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


class Results:
    """What the script found, and a run of one process to compare with."""

    def __init__(self, directory: Path, stages: list[str]) -> None:
        self.directory = directory
        self.single = trainer_in(directory / "one", save_steps=5, **EVEN)
        self.single.train()
        shutil.copytree(directory / "one" / "checkpoint-5", directory / "from-1")
        out = directory / "results.json"
        launch(SCRIPT, out, directory, *stages, timeout=540)
        self.found: dict[str, Any] = json.loads(out.read_text())


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("common"), ["2", "3"])


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("rare"), ["none", "1", "3"])


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("offload"), ["3-offload", "2"])


@pytest.fixture(
    params=[
        ("common", "2"),
        ("common", "3"),
        pytest.param(("rare", "none"), marks=pytest.mark.slow),
        pytest.param(("rare", "1"), marks=pytest.mark.slow),
        pytest.param(("rare", "3"), marks=pytest.mark.slow),
        pytest.param(("offload", "3-offload"), marks=pytest.mark.slow),
    ],
    ids=lambda found: f"{found[0]}-{found[1]}",
)
def case(request: pytest.FixtureRequest) -> tuple[Results, str]:
    group, stage = request.param
    return request.getfixturevalue(group), stage


def test_a_resumed_run_is_bit_equal(case: tuple[Results, str]) -> None:
    results, stage = case
    found = results.found[stage]
    assert found["partitioned"] == stage.startswith("3")
    assert found["same"] == 0
    assert found["lines_are_equal"]
    assert found["control"] > 1e-2


def test_a_run_goes_on_under_another_stage(case: tuple[Results, str]) -> None:
    results, stage = case
    found = results.found[stage]
    others = [name.removeprefix("to ") for name in found if name.startswith("to ")]
    assert others
    for other in others:
        assert found[f"to {other}"] < CLOSE
        assert found[f"losses to {other}"] == pytest.approx(found["losses"], abs=CLOSE)


def test_one_process_goes_on_as_two(case: tuple[Results, str]) -> None:
    results, stage = case
    found = results.found["even"][stage]
    single = [line["loss"] for line in logged(results.single) if "loss" in line]
    assert found["losses"] == pytest.approx(single, abs=CLOSE)
    assert found["from one"] == pytest.approx(single, abs=CLOSE)
    assert found["distance from one"] < CLOSE


def test_two_processes_go_on_as_one(case: tuple[Results, str], tmp_path: Path) -> None:
    results, stage = case
    single: SFTTrainer = results.single
    saved = results.directory / f"{stage}-even" / "checkpoint-5"
    resumed = trainer_in(tmp_path / "out", seed=5, **EVEN)
    resumed.train(resume_from_checkpoint=str(saved))
    found, expected = everything(resumed), everything(single)
    assert max((found[name] - expected[name]).abs().max() for name in expected) < CLOSE
    losses = [[line["loss"] for line in logged(t) if "loss" in line] for t in (resumed, single)]
    assert losses[0] == pytest.approx(losses[1], abs=CLOSE)
    # not because nothing was loaded
    start = molora.load(tiny("llama"), saved).state_dict()
    assert max((start[n] - expected[n]).abs().max() for n in start) > 1e-2


def test_checkpoints_of_every_stage_hold_the_trained_set_whole(case: tuple[Results, str]) -> None:
    """B-20, B-21: read in this process, which knows of no DeepSpeed."""
    results, stage = case
    found, _ = newest_complete(results.directory / f"{stage}-even")
    assert found is not None
    assert found.world_size == 2
    assert found.stage == (None if stage == "none" else int(stage[0]))
    mixture = molora.load(tiny("llama"), found.directory)
    own = mixture.state_dict()
    assert all(torch.isfinite(value).all() and value.abs().max() > 0 for value in own.values())
    moments = found.tensors()
    for name, value in own.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert moments[f"optimizer/{name}/{key}"].shape == value.shape
    # nothing of the base, and nothing twice: two moments and a step count of each tensor
    stored = {name: value for name, value in moments.items() if name.startswith("optimizer/")}
    assert len(stored) == 3 * len(own)
    size = sum(value.numel() * value.itemsize for value in stored.values())
    assert size == sum(2 * value.numel() * value.itemsize + 4 for value in own.values())

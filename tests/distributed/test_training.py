"""Longer than a step, cut into micro-batches, saved, and used between steps: two processes under
DDP and DeepSpeed against one (B-6, B-20, B-32, B-36)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_scenarios import CURVES, base_model
from launches import launch
from safetensors.torch import load_file
from tiny_models import batch_for

import molora

pytestmark = pytest.mark.distributed

ACCUMULATION = ["ddp", "zero2", "zero3"]
LAYOUTS = ["2x1x4", "2x2x2", "2x4x1"]
MODES = ["mola", "mixlora-gpt2"]
SLOW_MODES = [
    *((name, "zero3_tight") for name in (*MODES, "mixlora-checkpointing")),
    *((name, "zero3") for name in ("layer", "loramoe", "lora", "extras")),
]
STAGES = ["zero2", "zero3"]
QUICK = ["mola", "mixlora-switch"]
SLOW = [name for name in CURVES if name not in QUICK]

Results = dict[str, Any]


class Ran:
    """What jobs found, and where they wrote."""

    def __init__(self, directory: Path, jobs: Sequence[str]) -> None:
        self.directory = directory
        launch(Path(__file__).with_name("jobs.py"), directory, *jobs, timeout=600)
        self.results: Results = json.loads((directory / "results.json").read_text())

    def curve(self, preset: str) -> Results:
        (found,) = (v for k, v in self.results.items() if k.startswith(f"curves.compare:{preset},"))
        return dict(found)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    jobs = [
        "modes.zero_init",
        "modes.refusals",
        *(f"modes.compare:{name},zero3" for name in MODES),
        f"accumulation.compare:{','.join(ACCUMULATION)}",
        *(f"curves.compare:{name},zero2,zero3" for name in QUICK),
    ]
    return Ran(tmp_path_factory.mktemp("quick"), jobs)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    jobs = [
        "accumulation.compare:zero0,zero1,zero3_tight",
        *(f"modes.compare:{name},{engine}" for name, engine in SLOW_MODES),
        *(f"curves.compare:{name},zero2,zero3" for name in SLOW),
        "curves.compare:mola-balanced,ddp,zero0,zero1,zero3_tight",
    ]
    return Ran(tmp_path_factory.mktemp("slow"), jobs)


# ------------------------------------------------------------------ cut into micro-batches


def check_parts(found: Results) -> None:
    assert found["task"] < 1e-5
    assert found["same"] < 1e-5
    assert found["shares"] < 1e-5
    # what there is to get wrong
    assert found["moved"] > 1e-2
    assert found["aux"] > 1e-2
    assert found["uncounted"] > 1e-1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ACCUMULATION)
def test_a_step_does_not_depend_on_how_its_rows_are_cut_up(
    quick: Ran, engine: str, layout: str
) -> None:
    """Ragged rows, by the gradients of cross entropy and of auxiliary losses."""
    job = f"accumulation.compare:{','.join(ACCUMULATION)}"
    check_parts(quick.results[job][f"{engine}/{layout}"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero3_tight"])
def test_under_every_stage(slow: Ran, engine: str, layout: str) -> None:
    job = "accumulation.compare:zero0,zero1,zero3_tight"
    check_parts(slow.results[job][f"{engine}/{layout}"])


# ------------------------------------------------------------------ twenty steps


def check_curve(ran: Ran, preset: str, stage: str, found: Results) -> None:
    one, two = (torch.tensor(curve) for curve in (found["one_process"], found[stage]["curve"]))
    losses, norms = (one - two).abs().max(dim=0).values
    assert losses < 1e-4
    assert stage == "zero0" or norms < 1e-4 * one[:, 1].max()
    assert one[-5:, 0].mean() < one[:5, 0].mean() - 0.3  # it learns
    assert found[stage]["partitioned"] == stage.startswith("zero3")
    check_saved(ran.directory / f"{preset}-{stage}", preset, found[stage])


def check_saved(directory: Path, preset: str, found: Results) -> None:
    """Read without DeepSpeed, it is what the engine computed with."""
    assert found["end_error"] < 1e-5
    assert found["moved"] > 1e-2
    assert found["masters"] == 0
    assert found["others_get_nothing"]
    (file,) = directory.glob("molora-*.safetensors")
    assert found["bytes"] < file.stat().st_size < 1.2 * found["bytes"] + 8000  # names and shapes

    model = base_model(CURVES[preset])
    batch = batch_for(model, (6, 9, 3), seed=99, labels=False)
    with torch.no_grad():
        base = model(**batch).logits
        molora.load(model, directory)
        logits = model(**batch).logits
    expected = load_file(directory / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (logits - base).abs().max() > 1e-2


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", QUICK)
def test_losses_norms_and_files_are_those_of_one_process(
    quick: Ran, preset: str, stage: str
) -> None:
    check_curve(quick, preset, stage, quick.curve(preset))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", SLOW)
def test_with_every_preset(slow: Ran, preset: str, stage: str) -> None:
    check_curve(slow, preset, stage, slow.results[f"curves.compare:{preset},zero2,zero3"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ddp", "zero0", "zero1", "zero3_tight"])
def test_with_every_stage(slow: Ran, stage: str) -> None:
    found = slow.results["curves.compare:mola-balanced,ddp,zero0,zero1,zero3_tight"]
    check_curve(slow, "mola-balanced", stage, found)


# ------------------------------------------------------------------ besides training steps


def check_modes(found: Results, name: str) -> None:
    for step, modes in enumerate(found["modes"]):
        assert modes["logits"] < 5e-4
        assert modes["gates"] < 5e-4
        assert modes["counts"] == 0
        # a trained head is a part of it
        assert modes["base"] <= (1e-5 if name == "extras" else 0)
        assert modes["adapted"] > 0.1
        assert modes["tokens"]
        assert modes["partitioned"]
        assert modes["step"] < 1e-5 * (step + 1)
    one, two = found["counts"]
    assert one == two
    assert (two["router"] > 0) == (name != "lora")


@pytest.mark.parametrize("name", MODES)
def test_records_statistics_the_base_and_generation_between_steps_of_zero3(
    quick: Ran, name: str
) -> None:
    """Of the model itself, not of the engine, and before the first step too."""
    check_modes(quick.results[f"modes.compare:{name},zero3"], name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), SLOW_MODES)
def test_of_every_kind(slow: Ran, name: str, engine: str) -> None:
    check_modes(slow.results[f"modes.compare:{name},{engine}"], name)


def test_a_base_made_under_zero_init_trains_as_a_whole_one(quick: Ran) -> None:
    found = quick.results["modes.zero_init"]
    assert found["partitioned"]
    assert found["error"] < 5e-5
    assert found["moved"] > 1e-2


def test_reading_and_changing_what_is_divided_is_refused_with_what_helps(quick: Ran) -> None:
    said = quick.results["modes.refusals"]
    for action in ("save", "load", "detach"):
        assert "is divided over the ranks by ZeRO-3" in said[action]
        assert "gathered" in said[action]
    assert said["loaded"] == "0.0"  # inside of `gathered`

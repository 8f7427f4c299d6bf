"""The lines of metrics.jsonl: of every site, of alarms, and after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import lines

import molora
from molora.report.metrics import read_metrics
from molora.train.alarms import Alarm
from molora.train.metrics import MetricsWriter
from molora.train.run import train
from molora.train.summary import Report

RunFile = Callable[..., Path]
MOLA = {"preset": "mola", "num_experts": 4, "rank": 3}
ALARM = Alarm(4, "a.b", "dead", (1, 3), 200, "a.b: experts 1 and 3 got no token for 200 steps")
REPORT = Report(
    4,
    {"load_min": 0.0},
    {"a.b": {"load": [2 / 3, 0.0, 0.5, float("nan")], "dead": [1], "entropy": 0.123456789}},
    (ALARM,),
)


def state(step: int, *, first: bool = True) -> Any:
    return SimpleNamespace(is_world_process_zero=first, global_step=step, max_steps=10, epoch=0.5)


def begin(path: Path, step: int, *, first: bool = True) -> MetricsWriter:
    writer = MetricsWriter(path)
    writer.on_train_begin(None, state(step, first=first), None)
    return writer


def all_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_the_numbers_of_every_site(run_file: RunFile) -> None:
    result = train(molora.load_config(run_file(MOLA)), progress=False)
    file = result.output_dir / "metrics.jsonl"
    trained, routed = lines(file, "train"), lines(file, "routing")
    assert [line["step"] for line in routed] == [line["step"] for line in trained] == [2, 4]
    assert [line["kind"] for line in all_lines(file)][:2] == ["train", "routing"]
    for line, totals in zip(routed, trained, strict=True):
        assert line["sites"].keys() == result.mixture.built.sites.keys()
        for numbers in line["sites"].values():
            assert sum(numbers["load"]) == pytest.approx(4, rel=1e-4)
            expected = {"entropy", "margin", "balance", "load_min", "load_max", "dead"}
            expected |= {"aux/load_balance", "weighted/load_balance"}
            assert expected | {"router_grad_norm", "expert_grad_norm"} <= numbers.keys()
        least = min(numbers["load_min"] for numbers in line["sites"].values())
        assert totals["load_min"] == pytest.approx(least, rel=1e-4)
        squares = [totals[f"{role}_grad_norm"] ** 2 for role in ("expert", "router")]
        assert sum(squares) == pytest.approx(totals["grad_norm"] ** 2, rel=1e-5)
        assert totals["eta_seconds"] >= 0
    assert trained[1]["eta_seconds"] == 0
    assert "mfu" not in trained[0]  # a CPU has no known peak


def test_the_state_of_a_run_does_not_hold_the_numbers_of_every_site(run_file: RunFile) -> None:
    config = molora.load_config(run_file(MOLA, train={"save_steps": 4}))
    result = train(config, progress=False)
    kept = (result.output_dir / "checkpoint-4" / "trainer_state.json").read_text()
    assert "load_min" in kept
    assert "routing/" not in kept
    assert "q_proj" not in kept


def test_reports_and_alarms_are_lines(tmp_path: Path) -> None:
    writer = begin(tmp_path / "metrics.jsonl", 0)
    writer.on_report(REPORT)
    routing, alarm = all_lines(writer.path)
    assert (routing["kind"], routing["step"]) == ("routing", 4)
    found = {"load": [0.66667, 0.0, 0.5, None], "dead": [1], "entropy": 0.12346}
    assert routing["sites"] == {"a.b": found}
    assert alarm.pop("seconds") >= 0
    assert alarm == {
        "kind": "alarm",
        "step": 4,
        "site": "a.b",
        "event": "dead",
        "experts": [1, 3],
        "steps": 200,
        "message": "a.b: experts 1 and 3 got no token for 200 steps",
    }


def test_curves_are_of_training_and_evaluation_alone(tmp_path: Path) -> None:
    writer = begin(tmp_path / "metrics.jsonl", 0)
    writer.on_log(None, state(4), None, logs={"loss": 1.5, "load_min": 0.0})
    writer.on_report(REPORT)
    writer.on_log(None, state(4), None, logs={"eval_loss": 2.5})
    names = {curve.name for curve in read_metrics(writer.path)}
    assert names == {"loss", "load_min", "eta_seconds", "eval_loss"}


# ---------------------------------------------------------------------- resume


def written(path: Path) -> Path:
    """A run of six steps that was killed after a line of step 8 had begun."""
    writer = begin(path, 0)
    for step in (2, 4, 6):
        writer.on_log(None, state(step), None, logs={"loss": 1 / step})
        writer.on_report(Report(step, {}, REPORT.sites, (ALARM,) if step == 4 else ()))
        writer.on_log(None, state(step), None, logs={"eval_loss": 1 / step})
    writer.write("summary", 4, {"tokens": 3})
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 8, "seco')
    return path


@pytest.mark.parametrize(("step", "kept"), [(1, 0), (4, 7), (5, 7), (6, 10)])
def test_a_resumed_run_goes_on_after_its_checkpoint(step: int, kept: int, tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl")
    before = path.read_text().splitlines()
    writer = begin(path, step)
    without_summary = [line for line in before if '"summary"' not in line]
    assert path.read_text().splitlines() == without_summary[:kept]
    writer.on_log(None, state(step + 1), None, logs={"loss": 9.0})
    (*_, last) = all_lines(path)
    assert (last["step"], last["loss"]) == (step + 1, 9.0)
    seconds = [line["seconds"] for line in all_lines(path)]
    assert seconds == sorted(seconds)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_time_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    begin(path, 0).write("train", 2, {})
    path.write_text(path.read_text().replace('"seconds": 0.0', '"seconds": 100.5'))
    writer = begin(path, 2)
    writer.write("train", 4, {})
    assert 100.5 <= all_lines(path)[-1]["seconds"] < 130


def test_a_new_run_starts_anew_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl")
    before = path.read_bytes()
    other = begin(path, 0, first=False)
    other.on_log(None, state(2, first=False), None, logs={"loss": 1.0})
    assert path.read_bytes() == before
    begin(path, 0)
    assert path.read_bytes() == b""


def test_a_run_that_is_resumed_elsewhere_has_the_lines_to_come(tmp_path: Path) -> None:
    writer = begin(tmp_path / "metrics.jsonl", 4)
    writer.on_log(None, state(6), None, logs={"loss": 1.0})
    assert [line["step"] for line in all_lines(writer.path)] == [6]

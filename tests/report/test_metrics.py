from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora.report import Curve, read_metrics

LINES = [
    {"kind": "train", "step": 5, "seconds": 1.5, "epoch": 0.1, "loss": 2.0, "aux_loss": 0.25},
    {"kind": "train", "step": 10, "seconds": 3.0, "epoch": 0.2, "loss": 1.0, "aux_loss": 0.125},
    {"kind": "eval", "step": 10, "seconds": 4.0, "epoch": 0.2, "eval_loss": 1.5},
    {"kind": "summary", "step": 10, "seconds": 4.5, "loss": 99.0, "tokens": 1000},
]
CURVES = [
    Curve("loss", (5, 10), (2.0, 1.0)),
    Curve("aux_loss", (5, 10), (0.25, 0.125)),
    Curve("eval_loss", (10,), (1.5,)),
]


def _write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_number_becomes_a_curve(tmp_path: Path) -> None:
    assert read_metrics(_write(tmp_path / "metrics.jsonl", *LINES)) == CURVES


def test_curves_carry_the_name_of_their_run(tmp_path: Path) -> None:
    path = _write(tmp_path / "metrics.jsonl", *LINES)
    assert {curve.run for curve in read_metrics(path, run="mixture")} == {"mixture"}


@given(cut=st.integers(0, 400))
def test_a_file_cut_anywhere_gives_the_whole_lines(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    path.write_text(text[:cut])
    whole = [line for line in LINES if text.index(json.dumps(line)) + len(json.dumps(line)) <= cut]
    found = {curve.name: curve for curve in read_metrics(path)}
    steps = tuple(int(str(line["step"])) for line in whole if line["kind"] == "train")
    assert found.get("loss", Curve("loss", (), ())).steps == steps
    assert ("eval_loss" in found) == any(line["kind"] == "eval" for line in whole)


def test_a_value_that_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5}]
    (curve,) = read_metrics(_write(tmp_path / "metrics.jsonl", *lines))
    assert curve.steps == (1, 2, 3)
    assert math.isnan(curve.values[1])
    assert (curve.values[0], curve.values[2]) == (1.0, 0.5)


def test_a_step_that_a_resumed_run_repeats_has_its_last_value(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": v} for s, v in [(5, 3.0), (10, 2.0), (15, 9.0), (10, 2.5)]]
    (curve,) = read_metrics(_write(tmp_path / "metrics.jsonl", *lines))
    assert (curve.steps, curve.values) == ((5, 10, 15), (3.0, 2.5, 9.0))


def test_lines_that_are_no_metrics_are_passed_over(tmp_path: Path) -> None:
    path = _write(tmp_path / "metrics.jsonl", [1], "text", None, 3, {"loss": 1.0}, {"step": "5"})
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n" + b"[" * 100_000 + b"\n\n" + b'{"step": 1, "loss": "low"}\n')
        file.write(b'{"step": 2, "done": true, "loss": 4}\n')
    assert read_metrics(path) == [Curve("loss", (2,), (4.0,))]


def test_a_missing_file_has_no_curves(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []

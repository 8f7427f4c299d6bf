"""`molora bench`: its tables, its file of figures, and what it refuses; never how long it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.cli.bench import Row, machine, row_of
from molora.kernels import BACKENDS
from molora.kernels.calibrate import Case, Timed
from molora.kernels.calibration import Calibration, shipped, user_file
from molora.kernels.work import Shape

SMALL = ("--hidden", "16", "--experts", "4", "--tokens", "1", "--tokens", "6", "--runs", "1")
RUN = set(BACKENDS) - {"triton"}  # it needs a GPU


@pytest.fixture(autouse=True)
def no_figures_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def lines_of(outcome: Any) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_every_backend_op_and_pass_is_timed(molora: Callable[..., Any]) -> None:
    lines = lines_of(molora("bench", *SMALL, "--dtype", "bfloat16", "--json"))
    assert {(x["op"], x["pass"], x["tokens"]) for x in lines} == {
        (op, mode, tokens)
        for op in ("lora_mix", "lora_rows")
        for mode in ("forward", "training")
        for tokens in (1, 6)
    }
    for line in lines:
        assert (line["hidden"], line["experts"], line["rank"], line["top_k"]) == (16, 4, 8, 2)
        assert (line["dtype"], line["device"]) == ("bfloat16", "cpu")
        assert set(line["milliseconds"]) == set(line["estimated"]) == RUN
        assert {name for name, ms in line["estimated"].items() if ms is None} == {"reference"}
        assert line["auto"] in RUN - {"reference"}
        assert (line["auto"] == line["fastest"]) <= (line["auto_to_fastest"] == 1)


def test_a_dtype_that_a_backend_lacks_is_left_out(molora: Callable[..., Any]) -> None:
    lines = lines_of(molora("bench", *SMALL, "--dtype", "float64", "--json"))
    assert {frozenset(line["milliseconds"]) for line in lines} == {frozenset(RUN - {"grouped"})}


def test_tables_mark_what_auto_picks_and_say_by_whose_figures(molora: Callable[..., Any]) -> None:
    outcome = molora("bench", *SMALL)
    assert outcome.code == 0
    titles = [line for line in outcome.out.splitlines() if line.startswith("lora_")]
    assert titles[0].rstrip() == (
        "lora_mix, forward, float32, 16 to 16, top-2 of 4 experts of rank 8: ms"
    )
    assert len(titles) == 4
    assert outcome.out.count("*") == 4 * 2 + 1
    assert shipped().devices["cpu"].source in " ".join(outcome.out.split())


def test_a_calibration_is_kept_and_used_from_then_on(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora.cli.bench.machine", lambda device, threads: f"{threads} abacus")
    outcome = molora("bench", "--calibrate", *SMALL, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    assert f"Kept in {user_file()}." in outcome.out
    assert "Measuring lora_mix in float32" in outcome.err
    figures = Calibration.load(user_file()).devices["cpu"]
    assert figures.source == "measured by molora bench --calibrate on 1 abacus"
    assert set(figures.dtypes) == {"float32"}
    for line in figures.dtypes["float32"].crossovers:
        assert f"float32: {line}" in outcome.out
    again = " ".join(molora("bench", *SMALL).out.split())
    assert figures.source in again
    assert shipped().devices["cpu"].source not in again


def test_the_machine_is_named_with_its_threads_and_torch() -> None:
    assert machine("cpu", 3).startswith("3 thread(s) of ")
    assert machine("cpu", 3).endswith(f" with torch {torch.__version__}")


def test_a_calibration_of_one_device_leaves_those_of_others(
    molora: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    Calibration({"cuda": shipped().devices["cuda"]}).save(path)
    lines = lines_of(
        molora(*("bench", "--calibrate", *SMALL, "--dtype", "float32", "--json"), "--output", path)
    )
    assert len(lines) == 8
    assert set(Calibration.load(path).devices) == {"cpu", "cuda"}
    assert not user_file().exists()


def test_threads_are_as_before_when_it_ends(molora: Callable[..., Any]) -> None:
    before = torch.get_num_threads()
    assert molora("bench", *SMALL, "--threads", before + 1).code == 0
    assert molora("bench", *SMALL, "--threads", before + 1, "--dtype", "int8").code == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device tpu is not known. Known: cpu, cuda."),
        (["--dtype", "int8"], "--dtype int8 is not known. Known: float32, bfloat16,"),
        (["--experts", "2", "--top-k", "3"], "--top-k 3 exceeds --experts 2."),
        (["--output", "x.json"], "Add --calibrate"),
        (["--tokens", "0"], "Invalid value for '--tokens'"),
        (["--calibrate", "--dtype", "float64"], "not of float64"),
    ],
)
def test_a_wrong_option_is_exit_code_2_and_one_message(
    molora: Callable[..., Any], arguments: list[str], message: str
) -> None:
    outcome = molora("bench", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("Error") == 1


def test_cuda_without_a_device_is_an_error_that_says_so(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = molora("bench", "--device", "cuda")
    assert (outcome.code, outcome.out) == (2, "")
    assert "torch sees no CUDA or ROCm device here. Use --device cpu" in outcome.err


@pytest.mark.gpu
def test_backends_are_timed_on_a_gpu(molora: Callable[..., Any]) -> None:
    lines = lines_of(molora("bench", *SMALL, "--device", "cuda", "--dtype", "bfloat16", "--json"))
    assert {line["device"] for line in lines} == {"cuda"}


def test_a_damaged_file_of_figures_is_an_error(molora: Callable[..., Any]) -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text("{", encoding="utf-8")
    outcome = molora("bench", *SMALL)
    assert (outcome.code, outcome.out) == (2, "")
    assert str(user_file()) in outcome.err


def row(**rounds: tuple[float, ...]) -> Row:
    case = Case("lora_mix", Shape(1, 1024, 1024, 8, 8, 2), torch.float32, "cpu", training=False)
    return row_of([Timed(case, name, seconds) for name, seconds in rounds.items()], shipped())


def test_the_verdict_compares_auto_with_the_fastest_in_each_round() -> None:
    # one row: gather by the shipped figures
    assert row(reference=(0.1,), dense=(2.0,), gather=(1.0,)).verdict == "fastest"
    slower = row(dense=(1.0, 4.0, 1.0), gather=(1.5, 6.0, 1.5))
    assert (slower.auto, slower.fastest, slower.verdict) == ("gather", "dense", "1.50 × dense")
    assert row(dense=(1.0,), gather=(1.01,)).verdict == "≈ dense"

"""`molora train --nproc` does what one process does, and what cannot start says so."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import pytest
from launched_runs import end, ranks, start, write_run
from launches import free_port
from tiny_runs import lines

import molora
from molora.train.__main__ import main

pytestmark = pytest.mark.distributed


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in lines(output / "metrics.jsonl", "train")]


def test_two_processes_under_zero2_do_the_job_of_one(base: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, base)
    options = ("--nproc", 2, "--output-dir", tmp_path / "two")
    command = (sys.executable, "-m", "molora", "train", path, "train.deepspeed=zero2", *options)
    code, out, err = end(start(*command))
    assert code == 0, err

    alone = tmp_path / "alone"
    assert main([str(path), "train.batch_size=4", f"--output-dir={alone}", "--quiet"]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), abs=1e-4)
    assert len(losses(alone)) == 4

    engine = json.loads((tmp_path / "two" / "deepspeed.json").read_text("utf-8"))
    assert engine["zero_optimization"]["stage"] == 2
    assert engine["train_batch_size"] == 4
    assert f"DeepSpeed: {json.dumps(engine)}" in err
    assert out.count(f"The mixture is in {tmp_path / 'two' / 'adapter'}") == 1
    assert err.count("step 4/4") == 1

    saved = molora.load_config(tmp_path / "two" / "config.yaml")
    assert saved.train.deepspeed == "zero2"
    manifests = [
        json.loads((tmp_path / name / "adapter" / "molora.json").read_text("utf-8"))
        for name in ("two", "alone")
    ]
    assert manifests[0]["base"] == manifests[1]["base"]


@pytest.mark.slow
def test_processes_that_cannot_meet_say_why(base: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, base)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        shared = free_port()
        alone, in_use, two_masters, stranger = (
            start(*command, MOLORA_START_SECONDS="8")
            for command in (
                *ranks(path, size=3, only=[0]),
                *ranks(path, port=taken, only=[0]),
                *ranks(path, port=shared, size=3, only=[0]),
                *ranks(path, port=shared, size=2, only=[1]),
            )
        )
        started = time.monotonic()
        found = [end(process, timeout=60) for process in (alone, in_use, two_masters, stranger)]
    assert time.monotonic() - started < 60
    assert [code for code, _, _ in found] == [2, 2, 2, 2]
    messages = [err for _, _, err in found]
    assert "1 of 3 processes came within 8 s; not rank 1, 2." in messages[0]
    assert f"port {taken} is in use on this machine" in messages[1]
    assert "2 of 3 processes came within 8 s; not rank 2." in messages[2]
    assert "rank 0 on" in messages[3]
    assert "was told of 3 processes, rank 1 on" in messages[3]
    assert all(message.count("Error: ") == 1 for message in messages), messages
    assert not any("Traceback" in message for message in messages)
    assert not (tmp_path / "out").exists()


def test_a_command_line_that_cannot_be_read_is_one_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--nonsense", "run.yaml"]) == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
    assert main([]) == 2
    assert "required: config" in capsys.readouterr().err


def test_options_and_overrides_may_stand_in_any_order(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, base)
    arguments = ["--local_rank=0", str(path), "--quiet", "train.max_steps=1"]
    assert main([*arguments, f"--output-dir={tmp_path / 'one'}", "seed=3"]) == 0
    assert len(losses(tmp_path / "one")) == 1
    assert molora.load_config(tmp_path / "one" / "config.yaml").seed == 3
    assert capsys.readouterr().out == ""

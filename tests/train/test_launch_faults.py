"""What goes wrong in a launch is told once, within a minute, and ends every process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from launched_runs import end, ranks, start, write_run
from launches import ROOT, free_port
from tiny_runs import lines

from molora.io import newest_complete

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MOLORA = (sys.executable, "-m", "molora", "train")
WITHIN = 60
ENDLESS = {"max_steps": 1_000_000}


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Path]]]:
    """(command, name) → a process and the file that it writes to; what is left is killed."""
    started: list[psutil.Process] = []

    def run(command: list[object], name: str) -> tuple[subprocess.Popen[bytes], Path]:
        from launches import environment

        path = tmp_path / name
        with path.open("wb") as file:
            process = subprocess.Popen(
                [*map(str, command)], env=environment(), stdout=file, stderr=file
            )
        started.append(psutil.Process(process.pid))
        return process, path

    yield run
    for process in started:
        if process.is_running():
            for child in process.children(recursive=True):
                child.kill()
            process.kill()


def until(path: Path, words: str, *, seconds: float = 200) -> None:
    ends = time.monotonic() + seconds
    while words not in path.read_text("utf-8"):
        assert time.monotonic() < ends, path.read_text("utf-8")[-4000:]
        time.sleep(0.2)


def processes_of(launcher: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """Rank → its process."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    found = [child for child in children if "molora.train" in child.cmdline()]
    return {child.environ()["RANK"]: child for child in found}


def test_ranks_with_another_run_or_another_source_are_told_apart(
    base: Path, tmp_path: Path
) -> None:
    path = write_run(tmp_path, base)
    other = tmp_path / "other"
    shutil.copytree(ROOT / "molora", other / "molora", ignore=shutil.ignore_patterns("*.pyc"))
    with (other / "molora" / "errors.py").open("a", encoding="utf-8") as file:
        file.write("\n# another version\n")
    first, second = ranks(path, size=2, port=free_port())
    # there, since python -m looks for modules where it is started
    second.append("train.learning_rate=7e-3")
    started = [start(*first), start(*second, cwd=other, PYTHONPATH=str(other))]
    found = [end(process) for process in started]
    assert [code for code, _, _ in found] == [2, 2], found
    told = "".join(err for _, _, err in found)
    assert told.count("Error: ") == 1
    assert "the processes do not have the same run:" in told
    assert "- config.train.learning_rate: 0.007 on rank 1, 0.005 on rank 0" in told
    assert "- molora.source: " in told
    assert told.count("\n- ") == 2
    assert not (tmp_path / "out").exists()


def test_a_stale_compile_lock_is_told_by_one_process(base: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, base)
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    hour = time.time() - 3600
    os.utime(lock, (hour, hour))
    os.utime(lock.parent, (hour, hour))
    started = time.monotonic()
    command = (*MOLORA, path, "--nproc", 2, "train.deepspeed=zero2")
    code, _, err = end(start(*command, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")))
    assert time.monotonic() - started < WITHIN
    assert code == 2
    assert err.count("Error: ") == 1
    assert f"{lock} makes DeepSpeed wait" in err
    assert "Traceback" not in err


def test_a_users_error_in_all_ranks_is_one_message(base: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, base)
    missing = f"data.train=[{tmp_path}/missing.jsonl]"
    code, _, err = end(start(*MOLORA, path, "--nproc", 2, missing))
    assert code == 2
    assert err.count("Error: ") == err.count("missing.jsonl does not exist") == 1
    assert "Traceback" not in err


def test_a_killed_rank_ends_the_launch(
    base: Path, tmp_path: Path, watched: Callable[..., tuple[subprocess.Popen[bytes], Path]]
) -> None:
    path = write_run(tmp_path, base, train=ENDLESS)
    launcher, log = watched([*MOLORA, path, "--nproc", 2], "log")
    until(log, "step 3/")
    found = processes_of(launcher)
    found["1"].kill()
    assert launcher.wait(WITHIN) == 128 + signal.SIGKILL
    assert "Error: rank 1 was ended by SIGKILL; the others were stopped." in log.read_text("utf-8")
    assert not any(process.is_running() for process in found.values())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_without_a_launcher_the_others_stop_within_the_timeout(
    base: Path,
    tmp_path: Path,
    watched: Callable[..., tuple[subprocess.Popen[bytes], Path]],
    how: signal.Signals,
) -> None:
    path = write_run(tmp_path, base, train={**ENDLESS, "timeout_seconds": 20, "deepspeed": "zero2"})
    (first, log), (second, _) = (
        watched(command, f"log{rank}") for rank, command in enumerate(ranks(path))
    )
    until(log, "step 3/")
    second.send_signal(how)
    assert first.wait(20 + WITHIN) == 2
    told = log.read_text("utf-8")
    assert told.count("Error: ") == 1
    assert "rank 0 of 2 on " in told
    assert "lost the others: another process ended, or did not answer" in told
    assert "train.timeout_seconds=20" in told


def test_a_terminated_launch_leaves_a_checkpoint_from_which_another_goes_on(
    base: Path, tmp_path: Path, watched: Callable[..., tuple[subprocess.Popen[bytes], Path]]
) -> None:
    path = write_run(tmp_path, base, train={"max_steps": 60, "deepspeed": "zero2"})
    launcher, log = watched([*MOLORA, path, "--nproc", 2], "log")
    until(log, "step 3/")
    launcher.terminate()
    assert launcher.wait(WITHIN) == 128 + signal.SIGTERM
    checkpoint, _ = newest_complete(tmp_path / "out")
    assert checkpoint is not None
    assert not (tmp_path / "out" / "adapter").exists()

    code, _, err = end(start(*MOLORA, path, "--nproc", 2, "--resume", "auto"))
    assert code == 0, err
    assert checkpoint.directory.name in err
    assert (tmp_path / "out" / "adapter" / "molora.json").is_file()
    resumed = [line["loss"] for line in lines(tmp_path / "out" / "metrics.jsonl", "train")]

    options = ("--nproc", 2, "--output-dir", tmp_path / "straight")
    code, _, err = end(start(*MOLORA, path, *options))
    assert code == 0, err
    straight = [line["loss"] for line in lines(tmp_path / "straight" / "metrics.jsonl", "train")]
    assert resumed[-20:] == straight[-20:]

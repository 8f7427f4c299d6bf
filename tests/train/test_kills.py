"""Whole runs that are killed, and disks that fill up: nothing is lost, and the end is the same."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import largest_file
from launches import environment
from resumable import At, everything, trainer_in
from tiny_runs import lines
from transformers import AutoModelForCausalLM

import molora
from molora.io import newest_complete
from molora.train import train

RunFile = Callable[..., Path]
STEPS = 200
MIXTURE = {"preset": "mola", "num_experts": 3, "top_k": 2, "rank": 3, "dropout": 0.2}
TRAIN = {"max_steps": STEPS, "save_steps": 2, "logging_steps": 3, "save_total_limit": 2}


def start(run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "molora.train", str(run), "--resume", "auto", "--quiet"]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)


def newest_step(out: Path) -> int:
    """As the directories' names tell, complete or not."""
    return max((int(p.name.split("-")[1]) for p in out.glob("checkpoint-*")), default=0)


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of training, without what clocks and memory say."""
    left_out = ("seconds", "eta_seconds", "tokens_per_second", "memory_mib", "mfu")
    return [
        {name: value for name, value in line.items() if name not in left_out}
        for line in lines(out / "metrics.jsonl", "train")
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    run_file: RunFile, tmp_path: Path, base: Path
) -> None:
    run = run_file(MIXTURE, train=TRAIN)
    config = molora.load_config(run)
    straight = train(config, progress=False)
    expected = {name: value.clone() for name, value in straight.mixture.state_dict().items()}
    expected_lines = metrics(config.output_dir)
    config.output_dir.rename(tmp_path / "straight")
    moments = random.Random(0)
    out, kills, reached = config.output_dir, 0, []
    while kills < 6:
        process = start(run)
        before, deadline = newest_step(out), time.monotonic() + 120
        while process.poll() is None and newest_step(out) < before + 4:
            assert time.monotonic() < deadline, "makes no checkpoints"
            time.sleep(0.005)
        time.sleep(moments.random() * 0.3)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "had ended by itself: make the run longer"
        kills += 1
        found, _ = newest_complete(out)
        assert found is not None
        reached.append(found.step)
    assert reached == sorted(reached)
    assert reached[-1] > reached[0]
    last = start(run)
    _, told = last.communicate(timeout=240)
    assert last.returncode == 0, told.decode()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found_state = molora.load(model, out / "adapter").state_dict()
    torch.testing.assert_close(found_state, expected, rtol=0, atol=0)
    assert metrics(out) == expected_lines


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    trainer = trainer_in(out)
    with ExitStack() as limits:
        trainer.add_callback(At(6, lambda: limits.enter_context(largest_file(20_000))))
        with pytest.raises(molora.CheckpointError, match=r"could not be written: .*File too large"):
            trainer.train()
    found, _ = newest_complete(out)
    assert found is not None
    assert found.step == 4
    # the failed one makes room
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = trainer_in(out)
    resumed.train(resume_from_checkpoint=True)
    straight = trainer_in(tmp_path / "straight")
    straight.train()
    torch.testing.assert_close(everything(resumed), everything(straight), rtol=0, atol=0)

"""Preference training on two processes does what one does, under DDP and ZeRO alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from launches import launch
from safetensors import safe_open
from tiny_runs import WORDS, lines
from torch import Tensor

import molora
from molora.train import train

SCRIPT = Path(__file__).with_name("dpo_ranks.py")
MOLA = {"preset": "mola", "num_experts": 4, "top_k": 2, "rank": 3, "dropout": 0.0}
ROWS = [
    {
        "prompt": " ".join(WORDS[(7 * i + j) % 60] for j in range(2 + i % 4)),
        "chosen": f" {WORDS[(3 * i) % 20]}",
        "rejected": " " + " ".join(WORDS[20 + (5 * i + j) % 40] for j in range(1 + i % 3)),
    }
    for i in range(8)
]
SETTINGS = {
    "objective": {"kind": "dpo", "beta": 0.3},
    "max_steps": 6,
    "logging_steps": 1,
    "learning_rate": 2e-3,
    "lora_plus_ratio": 4.0,
    "router_learning_rate": 1e-3,
    "weight_decay": 0.1,
    "router_weight_decay": 0.2,
    "freeze": ["A"],
}
# small enough to be divided: by default tiny parameters stay whole
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def run(folder: Path, base: Path, *, batch_size: int, deepspeed: str | None = None) -> Path:
    folder.mkdir()
    rows = tiny_runs.write_rows(folder / "rows.jsonl", ROWS)
    settings = {**SETTINGS, "batch_size": batch_size, "deepspeed": deepspeed}
    return tiny_runs.write_run(folder / "run.yaml", base, rows, MOLA, train=settings)


def adapter(output: Path) -> dict[str, Tensor]:
    (path,) = (output / "adapter").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        pytest.param("zero2", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_do_what_one_process_does(engine: str, base: Path, tmp_path: Path) -> None:
    one = train(molora.load_config(run(tmp_path / "one", base, batch_size=4)), progress=False)
    deepspeed: str | None = None if engine == "ddp" else engine
    if engine == "zero3":
        deepspeed = str(tmp_path / "zero3.json")
        Path(deepspeed).write_text(json.dumps(ZERO3), encoding="utf-8")
    path = run(tmp_path / "two", base, batch_size=2, deepspeed=deepspeed)
    launch(SCRIPT, path, nproc=2)
    output = tmp_path / "two" / "out"

    expected, found = (lines(o / "metrics.jsonl", "train") for o in (one.output_dir, output))
    for name in ("loss", "rewards/margins", "tokens"):
        ours, theirs = ([line[name] for line in run] for run in (found, expected))
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert found[-1]["rewards/margins"] > 0.1
    # half of the pairs of every step give another curve
    half = train(molora.load_config(run(tmp_path / "half", base, batch_size=2)), progress=False)
    last = lines(half.output_dir / "metrics.jsonl", "train")[-1]
    assert abs(last["loss"] - expected[-1]["loss"]) > 1e-3

    start = molora.attach(one.model.__class__(one.model.config), one.mixture.config)
    states = one.mixture.state_dict(), adapter(output)
    for name, initial in start.state_dict().items():
        if name.endswith("lora_A"):
            assert torch.equal(states[0][name], initial)
            assert torch.equal(states[1][name], initial)
        else:
            moved = (states[0][name] - initial).abs().max()
            assert moved > 1e-3
            assert (states[1][name] - states[0][name]).abs().max() < 0.05 * moved, name

    for rank in range(2):
        seen: list[dict[str, Any]] = json.loads((output / f"rank{rank}.json").read_text("utf-8"))
        assert len(seen) == 6
        for step in seen:
            assert step["groups"] == {"experts.B": [8e-3, 0.1], "router": [1e-3, 0.2]}
            assert step["grads_on_base"] == 0
            assert (step["shapes"] == [[0]]) == (engine == "zero3")

"""TensorBoard and W&B get what metrics.jsonl has, of every site too."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import lines
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

import molora
from molora.train import trackers
from molora.train.alarms import Alarm
from molora.train.run import TrainResult, train
from molora.train.summary import Report

RunFile = Callable[..., Path]
MOLA = {"preset": "mola", "num_experts": 4, "rank": 3}
QUERY = "model.layers.1.self_attn.q_proj"


def run(path: Path) -> TrainResult:
    return train(molora.load_config(path), progress=False)


def routed(result: TrainResult) -> list[dict[str, Any]]:
    return lines(result.output_dir / "metrics.jsonl", "routing")


def test_tensorboard_has_the_logs_and_every_site(run_file: RunFile) -> None:
    result = run(run_file(MOLA, train={"report_to": ["tensorboard"]}))
    (folder,) = (result.output_dir / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    assert {"train/loss", "train/aux_loss", "train/load_min", "train/routing_entropy"} <= set(names)
    for site in result.mixture.built.sites:
        found = {name for name in names if name.startswith(f"routing/{site}/")}
        ends = {name.removeprefix(f"routing/{site}/") for name in found}
        assert {f"load/{expert}" for expert in range(4)} <= ends
        assert {"entropy", "margin", "dead_experts", "balance", "router_grad_norm"} <= ends
    for line in routed(result):
        numbers = line["sites"][QUERY]
        for name, value in {
            "entropy": numbers["entropy"],
            "load/2": numbers["load"][2],
            "dead_experts": len(numbers["dead"]),
            "weighted/load_balance": numbers["weighted/load_balance"],
        }.items():
            written = {e.step: e.value for e in events.Scalars(f"routing/{QUERY}/{name}")}
            assert written[line["step"]] == pytest.approx(value, rel=1e-4)


def test_nothing_is_tracked_unless_asked(run_file: RunFile) -> None:
    result = run(run_file(MOLA))
    assert not (result.output_dir / "runs").exists()
    assert len(routed(result)) == 2


ALARM = Alarm(4, "a.b", "dead", (1,), 200, "a.b: expert 1 got no token for 200 steps")
REPORT = Report(4, {}, {"a.b": {"load": [2.0, 0.0], "dead": [1], "margin": 0.5}}, (ALARM,))


def test_tensorboard_has_alarms_in_words(tmp_path: Path) -> None:
    running, closed = TensorBoardCallback(SummaryWriter(str(tmp_path))), TensorBoardCallback()
    trackers.send(REPORT, [closed, TrainerCallback(), running])
    running.tb_writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("alarms/text_summary")
    assert text.step == 4
    assert text.tensor_proto.string_val == [ALARM.message.encode()]
    assert [(e.step, e.value) for e in events.Scalars("routing/a.b/margin")] == [(4, 0.5)]


def test_scalars_are_named_by_site() -> None:
    assert trackers.scalars(REPORT) == {
        "routing/a.b/load/0": 2.0,
        "routing/a.b/load/1": 0.0,
        "routing/a.b/dead_experts": 1,
        "routing/a.b/margin": 0.5,
    }


def test_a_tracker_that_is_not_installed_names_its_extra(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        trackers, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    path = run_file(MOLA, train={"report_to": ["tensorboard"]})
    message = r"names tensorboard, which is not installed. Run pip install 'molora\[track\]'"
    with pytest.raises(molora.ConfigError, match=message):
        run(path)
    assert not (path.parent / "out").exists()


def test_other_trackers_are_refused(run_file: RunFile) -> None:
    with pytest.raises(molora.ConfigError, match=r"report_to"):
        molora.load_config(run_file(MOLA, train={"report_to": ["mlflow"]}))


# W&B brings twenty packages, so that the tests do not require it
if importlib.util.find_spec("wandb"):

    def test_wandb_gets_every_site_offline(
        run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import wandb

        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_SILENT", "true")
        result = run(run_file(MOLA, train={"report_to": ["wandb"]}))
        summary = dict(wandb.run.summary)
        wandb.finish()
        line = routed(result)[-1]["sites"][QUERY]
        assert summary["train/load_min"] < 1
        assert summary[f"routing/{QUERY}/entropy"] == pytest.approx(line["entropy"], rel=1e-4)
        assert summary[f"routing/{QUERY}/load/3"] == pytest.approx(line["load"][3], rel=1e-4)
        assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1

"""The engine's JSON follows from the run, and a hand-written one may not say something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molora.config.run import RunConfig
from molora.errors import ConfigError
from molora.presets import run_config
from molora.train.deepspeed_config import deepspeed_config, is_partitioned

ROOT = Path(__file__).parents[2]
TRAIN = {"batch_size": 2, "gradient_accumulation": 3, "max_grad_norm": 0.5, "learning_rate": 1e-3}


def run(deepspeed: str | None, **train: Any) -> RunConfig:
    return run_config(
        {
            "model": {"name": "base"},
            "data": {"train": ["rows.jsonl"]},
            "mixture": {"preset": "mola"},
            "train": {**TRAIN, "deepspeed": deepspeed, **train},
        }
    )


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Any], str]:
    """A hand-written JSON → its path."""

    def write(content: Any) -> str:
        path = tmp_path / "engine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return str(path)

    return write


def test_without_deepspeed_there_is_no_engine() -> None:
    assert deepspeed_config(run(None), world_size=4) is None
    assert not is_partitioned(None)


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3)])
def test_a_stage_is_derived_from_the_run(name: str, stage: int) -> None:
    engine = deepspeed_config(run(name), world_size=4)
    assert engine is not None
    assert engine["train_micro_batch_size_per_gpu"] == 2
    assert engine["gradient_accumulation_steps"] == 3
    assert engine["train_batch_size"] == 2 * 3 * 4
    assert engine["gradient_clipping"] == 0.5
    assert engine["zero_optimization"]["stage"] == stage
    assert engine["zero_optimization"]["overlap_comm"] is False
    assert not engine.keys() & {"bf16", "fp16", "optimizer", "scheduler"}
    assert is_partitioned(engine) is (stage == 3)
    assert not any("offload" in key for key in engine["zero_optimization"])
    assert json.loads(json.dumps(engine)) == engine


def test_offload_moves_parameters_and_optimiser_to_the_cpu_and_keeps_torchs_adamw() -> None:
    engine = deepspeed_config(run("zero3_offload"), world_size=1)
    assert engine is not None
    zero = engine["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"
    assert engine["zero_force_ds_cpu_optimizer"] is False


def test_a_file_is_filled_and_what_molora_does_not_know_passes_through(
    written: Callable[[Any], str],
) -> None:
    path = written(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 2,
            "comms_logger": {"enabled": True},
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": False},
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "reduce_bucket_size": "auto",
                "stage3_param_persistence_threshold": 0,
                "sub_group_size": 1000,
            },
        }
    )
    engine = deepspeed_config(run(path), world_size=2)
    derived = deepspeed_config(run("zero3"), world_size=2)
    assert engine is not None
    assert derived is not None
    assert engine.pop("comms_logger") == {"enabled": True}
    assert engine["zero_optimization"] == {
        **derived["zero_optimization"],
        "overlap_comm": True,
        "stage3_param_persistence_threshold": 0,
        "sub_group_size": 1000,
    }
    del engine["zero_optimization"], derived["zero_optimization"]
    assert engine == derived


@pytest.mark.parametrize(
    ("content", "both"),
    [
        ({"train_micro_batch_size_per_gpu": 5}, ["train_micro_batch_size_per_gpu=5", "size=2"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps=1", "accumulation=3"]),
        ({"train_batch_size": 13}, ["train_batch_size=13", "processes=12"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "train.max_grad_norm=0.5"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=True", "mixture.dtype='float32'"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled=True", "model.dtype='bfloat16'"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled=True", "model.dtype"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}},
            ["'AdamW' with lr=3e-05", "train.learning_rate=0.001"],
        ),
        ({"scheduler": {"type": "WarmupLR"}}, ["'WarmupLR'", "train.schedule='cosine'"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage=4", "0, 1, 2 and 3"]),
        ({"zero_force_ds_cpu_optimizer": True}, ["=True", "needs False"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel.autotp_size=2", "use 1"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_file_that_contradicts_the_run_is_an_error_with_both_values(
    written: Callable[[Any], str], content: dict[str, Any], both: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"engine\.json' contradicts the run") as caught:
        deepspeed_config(run(written(content)), world_size=2)
    assert [part for part in both if part not in str(caught.value)] == []


def test_all_contradictions_are_told_at_once(written: Callable[[Any], str]) -> None:
    path = written({"gradient_clipping": 9, "train_batch_size": 9, "optimizer": {"type": "Lamb"}})
    with pytest.raises(ConfigError, match="contradicts") as caught:
        deepspeed_config(run(path), world_size=2)
    assert str(caught.value).count("\n- ") == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read: .*line 1"),
        ("[1]", "must hold an object of settings, not list"),
        ('{"gradient_clipping": 0.5, "gradient_clipping": 1}', "'gradient_clipping' stands twice"),
        ('{"zero_optimization": 2}', "zero_optimization must be an object"),
        ('{"aio": {"block_size": "auto"}}', 'leaves aio.block_size to "auto"'),
        (" " * 1_000_001, "more than 1000000 bytes"),
    ],
    ids=["syntax", "list", "twice", "section", "auto", "large"],
)
def test_a_file_that_is_no_configuration_is_an_error(
    written: Callable[[Any], str], content: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(run(written(content)), world_size=2)


def test_a_missing_file_and_an_unknown_stage_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"missing\.json' cannot be read: .*one of zero1, zero2"):
        deepspeed_config(run("missing.json"), world_size=1)
    with pytest.raises(ConfigError, match=r"train: .*unknown name 'zero_3'. Close names: zero3.*"):
        run("zero_3")


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/deepspeed/*.json")), ids=lambda p: p.stem
)
def test_the_files_that_come_with_molora_fit_any_run(path: Path) -> None:
    engine = deepspeed_config(run(str(path), batch_size=7), world_size=3)
    assert engine is not None
    assert engine["train_batch_size"] == 7 * 3 * 3

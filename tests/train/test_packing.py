"""Packed runs learn what ordinary runs learn: where an optimiser step has the same sequences, it
has the same losses, gradients and routing (B-29)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from launches import launch
from tiny_models import randomize, sequences, tiny
from tiny_runs import lines, tokenizer

import molora
from molora.config import LoadBalance, Loss, RouterZ
from molora.data import Collator, pack
from molora.train import SFTTrainer, Trainer, train

LENGTHS = (11, 5, 9, 3, 12, 4, 8, 6)
WIDTH = 20
RATE = 0.02
LOSSES = (
    Loss(term=LoadBalance(form="switch"), coefficient=0.5),
    Loss(term=RouterZ(), coefficient=0.1),
)
OPTIONS: dict[str, Any] = {"rank": 4, "dropout": 0.0}
CONFIGS = {
    "mola": molora.presets.mola(num_experts=4, losses=LOSSES, **OPTIONS),
    "loramoe": molora.presets.loramoe(num_experts=4, **OPTIONS),
    "mixlora-switch": molora.presets.mixlora(
        num_experts=3, variant="switch", capacity=2, losses=LOSSES, **OPTIONS
    ),
}
PATHS = ["transformers", "molora", "trl"]
MEASURED = {"loss", "grad_norm", "aux_loss", "tokens", "load_min", "load_max", "entropy"}


def rows() -> Dataset:
    ids = [row.tolist() for row in sequences(LENGTHS)]
    # the first half has a prompt, the others have a label on every token
    labels = [[-100] * (2 if n < 4 else 0) + row[2 if n < 4 else 0 :] for n, row in enumerate(ids)]
    types = [n % 2 for n in range(len(ids))]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "task_types": types})


class OneSequenceARow:
    """A collator that leaves out what keeps the sequences of a packed row apart."""

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        batch = Collator(2)(examples)
        padding = batch.pop("segment_ids") == 0
        del batch["position_ids"]
        return batch | {"attention_mask": (~padding).long()}


def curve(
    path: str,
    config: molora.MixtureConfig,
    data: Dataset,
    tmp_path: Path,
    *,
    family: str = "llama",
    collator: Callable[..., Any] | None = None,
    checkpointing: bool = False,
    **options: Any,
) -> list[dict[str, float]]:
    """The logs of four optimiser steps, each over all of `data`."""
    mixture = molora.attach(tiny(family), config)
    randomize(mixture)
    for site in mixture.built.sites.values():
        site.router.jitter = 0.0
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": len(data),
        # not Adam, whose first step is the sign of a gradient however small, rounding included
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "activation_checkpointing": checkpointing,
        **options,
    }
    common: dict[str, Any] = {"train_dataset": data, "data_collator": collator or Collator(2)}
    if path == "transformers":
        # by default it keeps only columns that the model has arguments for
        arguments["remove_unused_columns"] = mixture.config.method != "loramoe"
        common["optimizers"] = (torch.optim.SGD(mixture.parameter_groups(RATE)), None)
        trainer: Any = transformers.Trainer(
            mixture.model, transformers.TrainingArguments(**arguments), **common
        )
    elif path == "molora":
        trainer = Trainer(
            mixture.model, transformers.TrainingArguments(**arguments), mixture=mixture, **common
        )
    else:
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
        trainer = SFTTrainer(
            mixture.model,
            trl.SFTConfig(**arguments),
            mixture=mixture,
            processing_class=tokenizer(),
            **common,
        )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_same(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other) == 4
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() & MEASURED:
            assert left[name] == pytest.approx(right[name], rel=3e-5, abs=1e-6), name


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("path", PATHS)
def test_a_packed_run_has_the_curve_of_an_ordinary_one(
    path: str, config: str, tmp_path: Path
) -> None:
    ordinary = curve(path, CONFIGS[config], rows(), tmp_path)
    packed = pack(rows(), WIDTH)
    assert len(packed) == 3
    assert_same(curve(path, CONFIGS[config], packed, tmp_path), ordinary)
    assert abs(ordinary[0]["loss"] - ordinary[-1]["loss"]) > 0.1
    if path != "transformers":
        assert ordinary[0]["tokens"] == sum(LENGTHS)
        assert ordinary[0]["aux_loss"] > 1e-4

    if config != "loramoe":  # whose rows would need a task type
        leaking = curve(path, CONFIGS[config], packed, tmp_path, collator=OneSequenceARow())
        assert abs(leaking[0]["loss"] - ordinary[0]["loss"]) > 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_accumulated_and_recomputed_packed_rows_count_by_their_tokens(
    path: str, tmp_path: Path
) -> None:
    """One packed row a micro-batch against the whole at once; GPT-2's labels are not shifted when
    they are counted."""
    packed = pack(rows(), WIDTH)
    config = molora.presets.mola(num_experts=4, losses=(), **OPTIONS)
    for family in ("llama", "gpt2"):
        whole = curve(path, config, rows(), tmp_path, family=family)
        parts = curve(
            path,
            config,
            packed,
            tmp_path,
            family=family,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            checkpointing=path != "transformers",
        )
        for name in ("loss", "grad_norm"):
            for one, other in zip(parts, whole, strict=True):
                assert one[name] == pytest.approx(other[name], rel=1e-5), (family, name)


def test_packed_data_needs_a_collator_and_a_base_that_knows_them(tmp_path: Path) -> None:
    packed = pack(rows(), WIDTH)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none")
    mixture = molora.attach(tiny("llama"), CONFIGS["mola"])
    with pytest.raises(molora.ConfigError, match=r"train_dataset is packed, which the trainer's"):
        Trainer(mixture.model, arguments, mixture=mixture, train_dataset=packed)
    flexible = molora.attach(tiny("llama", attn_implementation="flex_attention"), CONFIGS["mola"])
    keywords = {"mixture": flexible, "eval_dataset": packed, "data_collator": Collator(2)}
    with pytest.raises(molora.ConfigError, match=r"eval_dataset is packed, but .*flex_attention"):
        Trainer(flexible.model, arguments, **keywords)


def test_an_evaluation_of_packed_rows_has_the_loss_of_ordinary_ones(tmp_path: Path) -> None:
    """Without a cache, which transformers would make, and which would join the sequences."""
    arguments = {"output_dir": str(tmp_path), "report_to": "none", "bf16": False}
    mixture = molora.attach(tiny("llama"), CONFIGS["mola"])
    randomize(mixture)
    trainer = Trainer(
        mixture.model,
        transformers.TrainingArguments(**arguments, per_device_eval_batch_size=8),
        mixture=mixture,
        data_collator=Collator(2),
    )
    ordinary = trainer.evaluate(rows())["eval_loss"]
    assert trainer.evaluate(pack(rows(), WIDTH))["eval_loss"] == pytest.approx(ordinary, rel=1e-5)


def test_a_run_from_a_configuration_packs(run_file: Callable[..., Path]) -> None:
    mixture = {"preset": "loramoe", "num_experts": 4, "rank": 4}
    texts = [{"text": " ".join(f"w{(7 * i + j) % 60}" for j in range(4 + i))} for i in range(12)]
    rows = [{**row, "task_types": n % 2} for n, row in enumerate(texts)]
    config = molora.load_config(
        run_file(
            mixture,
            rows=rows,
            data={"packing": True, "max_length": 32},
            train={"max_steps": 4, "batch_size": 2},
        )
    )
    result = train(config, progress=False)
    (summary,) = lines(result.output_dir / "metrics.jsonl", "summary")
    found = summary["data"]["packing"]
    # every text ends with one more token
    assert found["tokens"] == sum(5 + i for i in range(12)) == summary["data"]["train"]["tokens"]
    assert found["sequences"] == 12
    assert found["bins"] == 4
    assert found["width"] == 32
    assert found["fill"] == pytest.approx(100 * found["tokens"] / (4 * 32))
    # two passes over the four packed rows
    assert summary["tokens"] == 2 * found["tokens"]
    assert json.dumps(found)
    first, last = lines(result.output_dir / "metrics.jsonl", "train")
    assert last["loss"] < first["loss"]
    assert first["aux_loss"] > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_packed_ranks_step_as_one_process_does_with_a_row_a_sequence(tmp_path: Path) -> None:
    launch(Path(__file__).with_name("packed_ranks.py"), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 9
    for name, step in found.items():
        assert step["error"] < 1e-5, name
        assert step["moved"] > 1e-2, name

"""Every method learns, and routers learn to tell tasks apart (B-33)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tiny_models import tiny
from tiny_runs import ROWS, lines, tokenizer
from torch import Tensor, nn

import molora
from molora.config import Dense, Group, LinearSite, MixtureConfig, TopK
from molora.data import Collator
from molora.presets import PRESETS
from molora.train import SFTTrainer
from molora.train.run import train

RunFile = Callable[..., Path]
# dropout is for other tests: with it the loss of a step is not the model's
PRESETS_AT_TINY_SIZE: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "molora": {"num_experts": 3, "rank": 4},
    "mola": {"num_experts": [2, 4], "rank": 4, "dropout": 0.0},
    "loramoe": {"num_experts": 4, "rank": 4, "dropout": 0.0},
    "mixlora": {"num_experts": 4, "rank": 4, "dropout": 0.0},
    "mixlora_top_p": {"num_experts": 4, "rank": 4, "dropout": 0.0, "variant": "top_p"},
    "mixlora_switch": {"num_experts": 4, "rank": 4, "dropout": 0.0, "variant": "switch"},
}


def test_every_preset_is_here() -> None:
    assert {name.partition("_")[0] for name in PRESETS_AT_TINY_SIZE} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS_AT_TINY_SIZE)
def test_a_preset_learns_eight_rows_by_heart(name: str, run_file: RunFile) -> None:
    mixture = {"preset": name.partition("_")[0], **PRESETS_AT_TINY_SIZE[name]}
    rows = [{**row, "task_types": number % 2} for number, row in enumerate(ROWS)]
    options = {"max_steps": 120, "batch_size": 8, "logging_steps": 40, "learning_rate": 2e-2}
    path = run_file(mixture, rows=rows, data={"eval": []}, train=options)
    config = molora.load_config(path)
    data = config.data.model_copy(update={"eval": config.data.train})
    result = train(config.model_copy(update={"data": data}), progress=False)
    trained = lines(result.output_dir / "metrics.jsonl", "train")
    assert trained[0]["loss"] > 0.5
    assert result.metrics["eval_loss"] < 0.05
    auxiliary = trained[-1].get("aux_loss", 0.0)
    assert trained[-1]["loss"] - auxiliary < 0.1
    if result.mixture.config.losses:
        assert auxiliary > 0


# ---------------------------------------------------------------------- routers alone


FIRST, SECOND = range(3, 33), range(33, 63)
"""The words of two languages."""


def walks(words: range, factor: int, count: int = 12, length: int = 9) -> list[list[int]]:
    """Rows in a language, where every word says which one comes next."""
    size = len(words)
    rows = [[(5 * number) % size] for number in range(count)]
    for row in rows:
        while len(row) < length:
            row.append((row[-1] * factor + 1) % size)
    return [[words[place] for place in row] for row in rows]


TASKS = [walks(FIRST, 7), walks(SECOND, 11)]


def rows_of(tasks: Sequence[list[list[int]]]) -> Dataset:
    rows = [row for task in tasks for row in task]
    numbers = [number for number, task in enumerate(tasks) for _ in task]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "task_ids": numbers})


def base_model() -> nn.Module:
    return tiny("llama", vocab_size=64, initializer_range=0.5, num_hidden_layers=1)


def trainer_for(mixture: molora.Mixture, data: Dataset, tmp_path: Path, steps: int) -> SFTTrainer:
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=12,
        learning_rate=2e-2,
        save_strategy="no",
        logging_steps=steps,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(
        mixture.model,
        arguments,
        mixture=mixture,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        data_collator=Collator(pad_token_id=2),
    )


def specialist(task: list[list[int]], tmp_path: Path) -> dict[str, Tensor]:
    """A plain LoRA that knows one language."""
    mixture = molora.attach(base_model(), molora.presets.lora(rank=4))
    trainer_for(mixture, rows_of([task]), tmp_path, 60).train()
    return {name: tensor.clone() for name, tensor in mixture.state_dict().items()}


def mutual_information(mixture: molora.Mixture) -> float:
    """Of the expert that a word prefers and the word's language, in nats, mean over the sites."""
    chosen: dict[str, list[Tensor]] = {}
    for task in TASKS:
        with mixture.record() as records, torch.no_grad():
            mixture.model.eval()(torch.tensor(task))
        for site, record in records.items():
            counts = torch.bincount(record.scores.argmax(dim=-1), minlength=2)
            chosen.setdefault(site, []).append(counts)
    total = 0.0
    for counts in chosen.values():
        joint = torch.stack(counts).double() / torch.stack(counts).sum()
        independent = joint.sum(dim=0, keepdim=True) * joint.sum(dim=1, keepdim=True)
        total += torch.xlogy(joint, joint / independent.clamp_min(1e-12)).sum().item()
    return total / len(chosen)


@pytest.mark.parametrize("select", [Dense(), TopK(k=1, renormalize=False)], ids=["dense", "top_1"])
def test_routers_alone_learn_which_expert_knows_a_language(select: Any, tmp_path: Path) -> None:
    experts = [specialist(task, tmp_path) for task in TASKS]
    # one decision for all of the layer: linears that decide alone may share the work otherwise
    group = Group(num_experts=2, rank=4, site=LinearSite(scope="layer"), select=select)
    mixture = molora.attach(base_model(), MixtureConfig(groups=(group,)))
    for name, tensor in mixture.state_dict().items():
        if ".experts." in name:
            tensor.copy_(torch.cat([expert[name] for expert in experts]))
    mixture.freeze("experts")
    fixed = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    trainer = trainer_for(mixture, rows_of(TASKS), tmp_path, 160)
    loss, information = trainer.evaluate()["eval_loss"], mutual_information(mixture)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.3 * loss
    assert information < 0.1
    assert mutual_information(mixture) > 0.5 * math.log(2)
    for name, tensor in mixture.state_dict().items():
        assert torch.equal(tensor, fixed[name]) == (".experts." in name)

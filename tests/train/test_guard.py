"""What is said of numbers that are not finite, where a model needs more than token ids."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tiny_models import padded, sequences, tiny
from tiny_trainers import mixture_on

import molora
from molora.train import Trainer


def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    return {"input_ids": padded(rows), "labels": padded(rows, value=-100)}


def trainer_on_t5(directory: Path) -> Trainer:
    mixture = mixture_on(tiny("t5"))
    arguments = transformers.TrainingArguments(
        str(directory), max_steps=1, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    rows = [row.tolist() for row in sequences([5, 3, 7])]
    return Trainer(
        mixture.model,
        arguments,
        mixture=mixture,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=collate,
    )


def test_a_decoders_module_is_named(tmp_path: Path) -> None:
    trainer = trainer_on_t5(tmp_path)
    linear = trainer.model.decoder.block[1].layer[2].DenseReluDense.wo
    linear.register_forward_hook(lambda module, args, y: y * math.nan)
    with pytest.raises(
        molora.TrainingError,
        match=r"step 1: the loss is nan, first at the output of decoder\.block\.1\.layer\.2\.Dense",
    ):
        trainer.train()


def test_gradients_of_an_encoder_are_named(tmp_path: Path) -> None:
    trainer = trainer_on_t5(tmp_path)
    name = "encoder.block.0.layer.0.SelfAttention.v.experts.lora_B"
    parameter = dict(trainer.model.named_parameters())[name]
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        molora.TrainingError, match=rf"step 1: the gradient of {name} is not finite\."
    ):
        trainer.train()

"""The loss of an evaluation is that of its tokens, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tiny_models import sequences, tiny
from tiny_trainers import dataset, mixture_on, sft

import molora
from molora.data import Collator, pack
from molora.train import Trainer

LENGTHS = (9, 4, 12, 3, 8, 5, 7)


def rows() -> Dataset:
    """Answers of one to nine tokens after prompts of two; the last row has no answer."""
    ids = [row.tolist() for row in sequences(LENGTHS)]
    labels = [[-100, -100, *row[2:]] for row in ids]
    labels[-1] = [-100] * LENGTHS[-1]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def by_hand(mixture: molora.Mixture, data: Dataset) -> list[list[float]]:
    """Row → the loss of each of its supervised tokens."""
    found = []
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = mixture.model.eval()(input_ids=ids).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none")
        found.append(losses[labels[1:] != -100].tolist())
    return found


def hf(mixture: molora.Mixture, directory: Path, **options: Any) -> Trainer:
    arguments = transformers.TrainingArguments(
        str(directory), report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **options
    )
    return Trainer(
        mixture.model, arguments, mixture=mixture, data_collator=Collator(pad_token_id=2)
    )


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8])
@pytest.mark.parametrize("path", ["molora", "trl"])
def test_it_is_the_mean_over_tokens(path: str, batch_size: int, tmp_path: Path) -> None:
    mixture, data = mixture_on(), rows()
    make = sft if path == "trl" else hf
    trainer: Any = make(mixture, tmp_path, per_device_eval_batch_size=batch_size)
    tokens = by_hand(mixture, data)
    expected = sum(map(sum, tokens)) / sum(map(len, tokens))
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(data, metric_key_prefix="x")["x_loss"] == pytest.approx(expected)
    # a mean over rows is another number
    by_row = [sum(row) / len(row) for row in tokens if row]
    assert abs(sum(by_row) / len(by_row) - expected) > 1e-2


def test_packed_rows_have_the_loss_of_their_sequences(tmp_path: Path) -> None:
    mixture, data = mixture_on(), rows()
    trainer = sft(mixture, tmp_path, per_device_eval_batch_size=2)
    plain = trainer.evaluate(data)["eval_loss"]
    packed = pack(data, 16)
    assert len(packed) < len(data)
    assert trainer.evaluate(packed)["eval_loss"] == pytest.approx(plain, rel=1e-5)


def test_rows_without_any_label_have_no_loss(tmp_path: Path) -> None:
    last = rows().select([len(LENGTHS) - 1])
    for make in (sft, hf):
        found = make(mixture_on(), tmp_path).evaluate(last)["eval_loss"]
        assert found != found  # not a number


def test_several_data_sets_have_a_loss_each(tmp_path: Path) -> None:
    mixture, data = mixture_on(), rows()
    halves = {"a": data.select(range(3)), "b": data.select(range(3, 7))}
    trainer = sft(mixture, tmp_path, per_device_eval_batch_size=2)
    found = trainer.evaluate(halves)
    for name, half in halves.items():
        tokens = by_hand(mixture, half)
        expected = sum(map(sum, tokens)) / sum(map(len, tokens))
        assert found[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_regression_has_the_trainers_own_loss(tmp_path: Path) -> None:
    model = tiny("bert", num_labels=1)
    mixture = mixture_on(model)
    trainer = hf(mixture, tmp_path, per_device_eval_batch_size=2)
    data = Dataset.from_dict(
        {
            "input_ids": [row.tolist() for row in sequences((4, 4, 4, 4))],
            "labels": [0.5, -1.0, 2.0, 0.0],
        }
    )
    trainer.data_collator = transformers.default_data_collator
    ids = torch.tensor(data["input_ids"])
    with torch.no_grad():
        scores = model.eval()(input_ids=ids).logits[:, 0]
    expected = (scores - torch.tensor(data["labels"])).square().mean().item()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_training_goes_on_as_if_it_had_not_been_evaluated(tmp_path: Path) -> None:
    losses = []
    for name, options in (("no", {}), ("yes", {"eval_strategy": "steps", "eval_steps": 1})):
        keywords = {"eval_dataset": rows()} if options else {}
        trainer = sft(mixture_on(), tmp_path / name, data=dataset(), keywords=keywords, **options)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1]

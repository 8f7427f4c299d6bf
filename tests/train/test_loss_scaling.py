"""Cross entropy and auxiliary losses have one gradient, however a batch is cut up (B-6, B-32)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tiny_models import padded, randomize, sequences, tiny
from tiny_runs import tokenizer
from torch import Tensor

import molora
from molora.config import Group, LoadBalance, Loss, RouterZ
from molora.data import Collator
from molora.train import SFTTrainer, Trainer

LOSSES = (
    Loss(term=LoadBalance(), coefficient=0.5),
    Loss(term=RouterZ(), coefficient=0.1, reduction="sum"),
)
SAME = [sequences([7])[0]] * 8
RAGGED = sequences([9, 4, 6, 3, 8, 5, 7, 4])
PATHS = ["transformers", "molora", "trl"]

Grads = dict[str, Tensor]


class Watched:
    """A collator that remembers what it gave."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        batch = Collator(pad_token_id=2)(examples)
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


def mixture_on(losses: Sequence[Loss]) -> molora.Mixture:
    group = Group(num_experts=4, rank=3)
    config = molora.MixtureConfig(groups=(group,), losses=tuple(losses))
    mixture = molora.attach(tiny("llama"), config)
    randomize(mixture)
    return mixture


def dataset(rows: Sequence[Tensor]) -> Dataset:
    # the prompts are a third of a row
    labels = [[-100] * (len(row) // 3) + row.tolist()[len(row) // 3 :] for row in rows]
    return Dataset.from_dict({"input_ids": [row.tolist() for row in rows], "labels": labels})


def one_step(
    path: str,
    rows: Sequence[Tensor],
    tmp_path: Path,
    *,
    accumulate: int,
    losses: Sequence[Loss] = LOSSES,
    data: Dataset | None = None,
) -> tuple[Grads, list[dict[str, Tensor]], float]:
    """The gradient of one optimiser step over eight rows, its micro-batches, and the loss logged:
    SGD with learning rate 1 and no clipping moves by the gradient."""
    mixture = mixture_on(losses)
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    options: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 8 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
    }
    collator = Watched()
    common: dict[str, Any] = {
        "train_dataset": dataset(rows) if data is None else data,
        "data_collator": collator,
        "optimizers": (torch.optim.SGD(mixture.parameter_groups(1.0), lr=1.0), None),
    }
    if path == "trl":
        options["dataset_kwargs"] = {"skip_prepare_dataset": True}
        arguments = trl.SFTConfig(**options)
        common |= {"processing_class": tokenizer(), "mixture": mixture}
        trainer: Any = SFTTrainer(mixture.model, arguments, **common)
    else:
        arguments = transformers.TrainingArguments(**options)
        cls: Any = transformers.Trainer if path == "transformers" else Trainer
        extra = {} if path == "transformers" else {"mixture": mixture}
        trainer = cls(mixture.model, arguments, **common, **extra)
    trainer.train()
    logged = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    after = mixture.state_dict()
    return {name: before[name] - after[name] for name in before}, collator.batches, logged


def reference(
    batches: Sequence[dict[str, Tensor]], *, shares: bool = True, losses: bool = True
) -> Grads:
    """Σ_i (CE summed over micro-batch i) / N + n_i / N · aux_i, in plain autograd."""
    mixture = mixture_on(())
    model = mixture.model.train()
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    total: Tensor = torch.stack(counts).sum()
    for batch, count in zip(batches, counts, strict=True):
        with mixture.record(detach=False) as records:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        loss = loss / total
        if losses:
            loss = loss + (count / total if shares else 1.0) * auxiliary(records)
        loss.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def auxiliary(records: dict[str, Any]) -> Tensor:
    balances, squares = [], []
    for record in records.values():
        valid = record.mask
        hits = torch.nn.functional.one_hot(record.expert_index[valid], 4).sum(dim=1).float()
        fraction = hits.sum(dim=0) / hits.sum()
        balances.append(4 * (fraction * record.scores[valid].mean(dim=0)).sum())
        squares.append(torch.logsumexp(record.logits[valid], dim=-1).square().mean())
    return 0.5 * torch.stack(balances).mean() + 0.1 * torch.stack(squares).sum()


def distance(one: Grads, other: Grads) -> float:
    """Greatest difference of any entry, relative to the largest entry of all."""
    assert one.keys() == other.keys()
    difference = max(float((one[name] - other[name]).abs().max()) for name in one)
    return difference / max(float(grad.abs().max()) for grad in other.values())


@pytest.mark.parametrize("path", PATHS)
def test_eight_equal_rows_at_once_or_in_four_parts_give_one_gradient(
    path: str, tmp_path: Path
) -> None:
    whole, _, loss = one_step(path, SAME, tmp_path, accumulate=1)
    parts, batches, loss_of_parts = one_step(path, SAME, tmp_path, accumulate=4)
    assert len(batches) == 4
    assert distance(parts, whole) < 1e-5
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    without, _, _ = one_step(path, SAME, tmp_path, accumulate=1, losses=())
    assert distance(without, whole) > 1e-2  # the auxiliary losses take part


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("path", PATHS)
def test_ragged_rows_weigh_by_their_supervised_tokens(
    path: str, accumulate: int, tmp_path: Path
) -> None:
    found, batches, _ = one_step(path, RAGGED, tmp_path, accumulate=accumulate)
    assert len(batches) == accumulate
    assert distance(found, reference(batches)) < 1e-5
    if accumulate > 1:  # the gradient that a plainly added auxiliary loss would have
        assert distance(found, reference(batches, shares=False)) > 1e-2


@pytest.mark.parametrize("path", PATHS)
def test_the_cross_entropy_of_ragged_rows_does_not_depend_on_accumulation(
    path: str, tmp_path: Path
) -> None:
    whole, batches, _ = one_step(path, RAGGED, tmp_path, accumulate=1, losses=())
    parts, _, _ = one_step(path, RAGGED, tmp_path, accumulate=4, losses=())
    assert distance(parts, whole) < 1e-5
    assert distance(whole, reference(batches, losses=False)) < 1e-5
    assert distance(whole, reference(batches)) > 1e-2


@pytest.mark.parametrize("path", ["molora", "trl"])
def test_the_number_of_processes_scales_all_of_the_loss_alike(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = mixture_on(LOSSES)
    rows = dataset(RAGGED)
    options: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "bf16": False}
    options["activation_checkpointing"] = False
    trainer: Any
    if path == "trl":
        options["dataset_kwargs"] = {"skip_prepare_dataset": True}
        trainer = SFTTrainer(
            mixture.model,
            trl.SFTConfig(**options),
            mixture=mixture,
            train_dataset=rows,
            processing_class=tokenizer(),
        )
    else:
        arguments = transformers.TrainingArguments(**options)
        trainer = Trainer(mixture.model, arguments, mixture=mixture, train_dataset=rows)
    mixture.model.train()
    batch = Collator(pad_token_id=2)(list(rows))
    items = torch.tensor(100)

    def loss() -> float:
        with_items = trainer.compute_loss(mixture.model, dict(batch), num_items_in_batch=items)
        return with_items.item()

    alone = loss()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert loss() == pytest.approx(2 * alone, rel=1e-6)


class OtherRows:
    """A collator for models whose labels are not shifted inputs: answers of other lengths for
    encoder-decoders, a class for classifiers; none for rows of the lengths in `idle`."""

    def __init__(self, family: str, idle: Sequence[int]) -> None:
        self.family = family
        self.idle = idle
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [row[: 1 + len(row) // 3] if self.family == "t5" else row[0] % 3 for row in rows]
        labels = [
            torch.full_like(answer, -100) if len(row) in self.idle else answer
            for row, answer in zip(rows, labels, strict=True)
        ]
        self.batches.append(
            {
                "input_ids": padded(rows),
                "attention_mask": padded([torch.ones_like(row) for row in rows]),
                "labels": padded(labels, value=-100)
                if self.family == "t5"
                else torch.stack(labels),
            }
        )
        return {name: tensor.clone() for name, tensor in self.batches[-1].items()}


@pytest.mark.parametrize("family", ["t5", "bert"])
class TestModelsWhoseLossIsAMeanWhateverTheyAreTold:
    """T5 and classifiers take num_items_in_batch, and do not look at it."""

    def step(
        self, family: str, cls: Any, directory: Path, accumulate: int, idle: Sequence[int] = ()
    ) -> tuple[Grads, list[dict[str, Tensor]]]:
        mixture = self.mixture(family, LOSSES)
        before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
        arguments = transformers.TrainingArguments(
            str(directory),
            max_steps=1,
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        collator = OtherRows(family, idle)
        trainer = cls(
            mixture.model,
            arguments,
            train_dataset=dataset(RAGGED),
            data_collator=collator,
            optimizers=(torch.optim.SGD(mixture.parameter_groups(1.0), lr=1.0), None),
            **({"mixture": mixture} if cls is Trainer else {}),
        )
        trainer.train()
        after = mixture.state_dict()
        return {name: before[name] - after[name] for name in before}, collator.batches

    def mixture(self, family: str, losses: Sequence[Loss]) -> molora.Mixture:
        config = molora.MixtureConfig(groups=(Group(num_experts=4, rank=3),), losses=tuple(losses))
        mixture = molora.attach(tiny(family), config)
        randomize(mixture)
        return mixture

    def reference(self, family: str, batches: Sequence[dict[str, Tensor]]) -> Grads:
        """Σ_i (CE summed over micro-batch i) / N + n_i / N · aux_i."""
        mixture = self.mixture(family, ())
        model = mixture.model.train()
        counts = [(batch["labels"] != -100).sum() for batch in batches]
        for batch, count in zip(batches, counts, strict=True):
            with mixture.record(detach=False) as records:
                logits = model(**batch).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, -2), batch["labels"].flatten(), reduction="sum"
            )
            ((loss + count * auxiliary(records)) / sum(counts)).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_they_weigh_by_their_supervised_tokens(
        self, family: str, accumulate: int, tmp_path: Path
    ) -> None:
        found, batches = self.step(family, Trainer, tmp_path, accumulate)
        assert distance(found, self.reference(family, batches)) < 1e-5

    def test_a_micro_batch_without_a_label_counts_nothing(
        self, family: str, tmp_path: Path
    ) -> None:
        found, batches = self.step(family, Trainer, tmp_path, 8, idle=(5, 7))
        counts = [int((batch["labels"] != -100).sum()) for batch in batches]
        assert counts.count(0) == 2
        assert distance(found, self.reference(family, batches)) < 1e-5

    def test_the_plain_trainer_adds_up_means(self, family: str, tmp_path: Path) -> None:
        """A known limit of it, which the docstring of molora.train.Trainer names."""
        found, batches = self.step(family, transformers.Trainer, tmp_path, 4)
        assert distance(found, self.reference(family, batches)) > 0.1


@pytest.mark.parametrize("path", ["molora", "trl"])
def test_a_micro_batch_without_a_label_counts_nothing(path: str, tmp_path: Path) -> None:
    rows = dataset(RAGGED)
    labels = rows["labels"]
    idle = [[-100] * len(row) if i in (1, 4, 5, 6) else row for i, row in enumerate(labels)]
    data = rows.remove_columns("labels").add_column("labels", idle)
    found, batches, loss = one_step(path, RAGGED, tmp_path, accumulate=8, data=data)
    supervised = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    assert supervised.count(0) == 4
    assert distance(found, reference(batches)) < 1e-5
    assert loss > 0


def test_trl_without_the_mixin_is_refused(tmp_path: Path) -> None:
    mixture = mixture_on(LOSSES)
    arguments = trl.SFTConfig(
        str(tmp_path),
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        bf16=False,
        disable_tqdm=True,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
    )
    trainer = trl.SFTTrainer(
        mixture.model, arguments, train_dataset=dataset(SAME), processing_class=tokenizer()
    )
    with pytest.raises(molora.AttachError, match="drop the auxiliary losses silently"):
        trainer.train()

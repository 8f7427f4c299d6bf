"""One step of a Trainer by SGD with a learning rate of 1, which moves by the gradient, and what
that gradient should be by plain autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tiny_models import randomize, sequences, tiny
from tiny_runs import tokenizer
from torch import Tensor, nn

import molora
from molora.config import Group, LoadBalance, LocalizedBalance, Loss, RouterZ
from molora.data import Collator
from molora.train import SFTTrainer, Trainer
from molora.train.gather import gathered_state

PATHS = ("transformers", "molora", "trl")
LOSSES = (
    Loss(term=LoadBalance(), coefficient=0.5),
    Loss(term=RouterZ(), coefficient=0.1, reduction="sum"),
)
TYPED = (Loss(term=LocalizedBalance(delta=0.3), coefficient=0.5),)
EXPERTS = 4
RAGGED = (9, 4, 6, 3, 8, 5, 7, 4)
# the longest is of no use, and most of the rest of its batch is padding
SPARSE = (30, 2, 2, 3, 30, 2, 3, 2)

Grads = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass
class Step:
    """What one optimiser step did on this rank."""

    moved: Grads
    batches: list[Batch]
    """Its micro-batches."""
    logged: dict[str, float]
    partitioned: bool


class Watched:
    """A collator that remembers what it gave."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, examples: Sequence[Any]) -> Batch:
        batch = Collator(pad_token_id=2)(examples)
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


def mixture_with(losses: Sequence[Loss]) -> molora.Mixture:
    """Top-2 of 4 experts at every linear."""
    config = molora.MixtureConfig(
        groups=(Group(num_experts=EXPERTS, rank=3),), losses=tuple(losses)
    )
    mixture = molora.attach(tiny("llama"), config)
    randomize(mixture)
    return mixture


def rows_of(case: str, rows_per_batch: int) -> Dataset:
    """Eight rows in order; every second batch goes to the second rank.

    Args:
        case: "ragged" and "task", with prompts of a third of a row; "same", equal rows; "idle",
            without a label on the second rank; "sparse", almost none there; "types".
    """
    lengths = {"same": (7,) * 8, "sparse": SPARSE}.get(case, RAGGED)
    ids = [row.tolist() for row in sequences(lengths)]
    if case == "same":
        ids = [ids[0]] * 8
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    for i in range(8):
        second = (i // rows_per_batch) % 2 == 1
        if second and (case == "idle" or (case == "sparse" and lengths[i] > 3)):
            labels[i] = [-100] * len(ids[i])
    columns: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if case == "types":
        columns["task_types"] = [0, 1, 1, 0, 1, 1, 1, 0]
    return Dataset.from_dict(columns)


def losses_of(case: str) -> tuple[Loss, ...]:
    return {"task": (), "types": TYPED}.get(case, LOSSES)


def one_step(
    path: str, directory: Path, *, case: str, rows: int, accumulate: int, **options: Any
) -> Step:
    """A step of `accumulate` micro-batches of `rows` rows on this rank."""
    mixture = mixture_with(losses_of(case))
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    collator = Watched()
    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
        "remove_unused_columns": False,
        **options,
    }
    keywords: dict[str, Any] = {
        "train_dataset": rows_of(case, rows),
        "data_collator": collator,
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0}),
    }
    trainer: Any
    if path == "trl":
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
        trainer = SFTTrainer(
            mixture.model,
            trl.SFTConfig(**arguments),
            mixture=mixture,
            processing_class=tokenizer(),
            **keywords,
        )
    elif path == "molora":
        made = transformers.TrainingArguments(**arguments)
        trainer = Trainer(mixture.model, made, mixture=mixture, **keywords)
    else:
        made = transformers.TrainingArguments(**arguments)
        trainer = transformers.Trainer(mixture.model, made, **keywords)
    trainer.train()
    after = gathered_state(mixture, rank0_only=False)
    (logged,) = (line for line in trainer.state.log_history if "loss" in line)
    return Step(
        {name: before[name] - after[name] for name in before},
        collator.batches,
        logged,
        all(p.shape == (0,) for p in mixture.model.parameters()),
    )


def reference(
    batches: Sequence[Batch],
    case: str,
    *,
    shares: bool = True,
    auxiliary_factor: float = 1.0,
) -> tuple[Grads, float]:
    """Gradient and value of Σ_i (CE summed over micro-batch i) / N + n_i / N · aux_i.

    Args:
        batches: all micro-batches of all ranks.
        case: which auxiliary losses.
        shares: without, every micro-batch's auxiliary losses count in full.
        auxiliary_factor: as they would count if a factor was forgotten.
    """
    mixture = mixture_with(())
    model = mixture.model.train()
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    number, value = torch.stack(counts).sum(), 0.0
    for batch, count in zip(batches, counts, strict=True):
        with mixture.record(detach=False) as records:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        loss = loss / number
        if case != "task":
            weight = auxiliary_factor * (count / number if shares else 1.0)
            loss = loss + weight * auxiliary(records, batch)
        loss.backward()
        value += loss.item()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, value


def auxiliary(records: Mapping[str, Any], batch: Batch) -> Tensor:
    """LOSSES of a forward, or TYPED where the batch has types."""
    if "task_types" in batch:
        return 0.5 * torch.stack([_localized(r, batch) for r in records.values()]).mean()
    balances, squares = [], []
    for record in records.values():
        valid = record.mask
        hits = nn.functional.one_hot(record.expert_index[valid], EXPERTS).sum(dim=1).float()
        fraction = hits.sum(dim=0) / hits.sum()
        balances.append(EXPERTS * (fraction * record.scores[valid].mean(dim=0)).sum())
        squares.append(torch.logsumexp(record.logits[valid], dim=-1).square().mean())
    return 0.5 * torch.stack(balances).mean() + 0.1 * torch.stack(squares).sum()


def _localized(record: Any, batch: Batch) -> Tensor:
    """Unbiased variance ÷ mean² of a sequence's scores, raised or lowered by 0.3."""
    shape = (*batch["input_ids"].shape, EXPERTS)
    scores_BSE = record.scores.view(shape) * batch["attention_mask"][:, :, None]
    mass = scores_BSE.sum(dim=1)
    weighted = []
    for sequence, kind in zip(mass, batch["task_types"].tolist(), strict=True):
        for expert in range(EXPERTS):
            meets = (kind == 1) == (expert < EXPERTS // 2)
            weighted.append(sequence[expert] * (1.3 if meets else 0.7))
    z = torch.stack(weighted)
    return ((z - z.mean()) ** 2).sum() / (len(z) - 1) / z.mean() ** 2


def distance(one: Grads, other: Grads) -> float:
    """Greatest difference of any entry, relative to the largest entry of all."""
    assert one.keys() == other.keys()
    difference = max(float((one[name] - other[name]).abs().max()) for name in one)
    return difference / max(float(grad.abs().max()) for grad in other.values())


def norm(grads: Grads) -> float:
    """Of all entries together."""
    return torch.stack([grad.norm() for grad in grads.values()]).norm().item()

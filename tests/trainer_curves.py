"""Twenty steps of every preset through `SFTTrainer`, on one process or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tiny_models import randomize, sequences, tiny
from tiny_runs import tokenizer
from torch import Tensor
from transformers import TrainerCallback

import molora
from molora.config import MixtureConfig
from molora.data import Collator, pack
from molora.presets import lora, loramoe, mixlora, mola
from molora.train import SFTTrainer
from molora.train.gather import gathered_state

STEPS = 20
ROWS = 4
"""Of a micro-batch: two of one process in turn, or one of each of two processes."""
SMALL = {"rank": 3, "dropout": 0.0}
E6 = {"num_experts": 6, **SMALL}


@dataclass(frozen=True)
class Curve:
    """A mixture and how it is trained."""

    config: MixtureConfig
    base_dtype: torch.dtype = torch.float32
    rows: int = 40
    """Of the data set; batches are of eight."""
    packed: bool = False
    freeze: tuple[str, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """Of the trainer."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of its arguments."""


CURVES = {
    "lora": Curve(lora(**SMALL)),
    "molora": Curve(molora.presets.molora(num_experts=5, **SMALL)),
    "mola": Curve(mola(**E6)),
    "mola-triangle": Curve(mola(**SMALL)),
    "loramoe": Curve(loramoe(**E6)),
    "mixlora": Curve(mixlora(**E6)),
    "mixlora-top_p": Curve(mixlora(**E6, variant="top_p")),
    "mixlora-switch": Curve(mixlora(num_experts=4, **SMALL, variant="switch", capacity=3)),
    "mola-task": Curve(mola(**E6, losses=())),
    "checkpointing": Curve(
        mixlora(**E6), options={"activation_checkpointing": True, "max_grad_norm": 0.3}
    ),
    "packing": Curve(loramoe(**E6), rows=64, packed=True),
    "bf16": Curve(mola(**E6), base_dtype=torch.bfloat16),
    "router": Curve(mola(**E6), freeze=("experts",)),
    "uneven": Curve(mola(**E6, losses=()), rows=21),
    "lora_plus": Curve(
        mola(**E6),
        keywords={
            "lora_plus_ratio": 4.0,
            "router_learning_rate": 1e-2,
            "router_weight_decay": 0.1,
        },
        options={"weight_decay": 0.05},
    ),
}
"""Every preset with its own auxiliary losses, and ways to train one."""


class Watch(TrainerCallback):
    """Notes after every step whether no rank holds a whole parameter."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.partitioned: list[bool] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.partitioned.append(all(p.shape == (0,) for p in self.model.parameters()))


def rows(number: int, *, packed: bool) -> Dataset:
    """Prompts and answers of many lengths, of two types."""
    lengths = [4 + (5 * i) % 9 for i in range(number)]
    ids = [row.tolist() for row in sequences(lengths, seed=3)]
    labels = [[-100] * (1 + i % 3) + row[1 + i % 3 :] for i, row in enumerate(ids)]
    types = [i % 2 for i in range(len(ids))]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels, "task_types": types})
    return pack(data, 22) if packed else data


def trainer_of(
    curve: Curve, directory: Path, *, rows_per_batch: int = ROWS, **options: Any
) -> SFTTrainer:
    """Steps so small that rounding does not grow into other choices of experts."""
    base = tiny("llama", num_hidden_layers=4 if curve is CURVES["mola-triangle"] else 2)
    mixture = molora.attach(base.to(curve.base_dtype), curve.config, seed=3)
    randomize(mixture, 0.05)
    for site in mixture.built.sites.values():
        site.router.jitter = 0.0
    for role in curve.freeze:
        mixture.freeze(role)  # type: ignore[arg-type]
    arguments = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": rows_per_batch,
        "learning_rate": 3e-3,
        "adam_epsilon": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "max_grad_norm": 1e3,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTTrainer(
        mixture.model,
        trl.SFTConfig(**{**arguments, **curve.options, **options}),
        mixture=mixture,
        train_dataset=rows(curve.rows, packed=curve.packed),
        processing_class=tokenizer(),
        data_collator=Collator(pad_token_id=2),
        **curve.keywords,
    )


_TOLD = (
    *("loss", "grad_norm", "aux_loss", "expert_grad_norm", "router_grad_norm", "tokens"),
    *("load_min", "load_max", "routing_entropy", "routing_margin", "learning_rate"),
)


def trained(trainer: SFTTrainer) -> dict[str, Any]:
    """What a run says of every step, by name; every rank calls it."""
    watch = Watch(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == STEPS
    curves = {n: [line[n] for line in lines] for n in _TOLD if n in lines[0]}
    return {"curves": curves, "partitioned": watch.partitioned}


def state(trainer: SFTTrainer) -> dict[str, Tensor]:
    """The mixture of a trainer under any engine; every rank calls it."""
    return gathered_state(trainer.mixture, rank0_only=False)

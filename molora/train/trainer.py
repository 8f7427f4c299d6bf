"""Trainers with a mixture: TRL's for supervised fine-tuning, and transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
import trl

from molora.attach import Mixture
from molora.attach.side_inputs import SIDE_COLUMNS
from molora.errors import DataError
from molora.train import refusals
from molora.train.mixin import MixtureTrainerMixin
from molora.train.per_token import per_token


class SFTTrainer(MixtureTrainerMixin, trl.SFTTrainer):
    """TRL's SFTTrainer for a model that carries a mixture; see `MixtureTrainerMixin`.

    Columns ``task_ids``, ``task_types``, ``cluster_ids`` and ``expert_labels`` of the data sets
    reach the mixture, also through TRL's own collators.

    Raises:
        AttachError: besides the mixin's, experts on the LM head, which TRL's loss reads past.
    """

    def __init__(self, model: Any, args: Any = None, *, mixture: Mixture, **keywords: Any) -> None:
        refusals.check_model(model, mixture)
        refusals.check_head(mixture)
        super().__init__(model, args, mixture=mixture, **keywords)
        if keywords.get("data_collator") is None:
            self.data_collator = SideColumns(self.data_collator)

    def _send_telemetry(self) -> None:
        """Nothing is reported to anybody about a run."""


class Trainer(MixtureTrainerMixin, transformers.Trainer):
    """transformers' Trainer for a model that carries a mixture; see `MixtureTrainerMixin`.

    The plain Trainer trains a mixture on a causal language model correctly too: `model(…).loss`
    holds the auxiliary losses, scaled like the cross entropy. It saves the base model with every
    checkpoint, has one learning rate, logs no routing, and cannot know what of this was not wanted.
    On T5 and classifiers, with or without a mixture, its gradients grow with accumulation and
    with the number of processes, see `per_token`; here they do not.
    """

    def _task_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        found = per_token(self, super()._task_loss, model, inputs, num_items_in_batch)
        return found if return_outputs else found[0]


class SideColumns:
    """A collator that keeps the columns which are for the mixture: `collate`, plus (B,) tensors.

    Raises:
        DataError: when only some examples have a column.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate(list(examples))
        for name in SIDE_COLUMNS:
            present = [name in example for example in examples]
            if all(present):
                batch[name] = torch.tensor([int(example[name]) for example in examples])
            elif any(present):
                raise DataError(
                    f"`{name}` is in {sum(present)} of {len(present)} examples of a batch. "
                    "Give it to every row, or to none."
                )
        return batch

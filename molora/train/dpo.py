"""Preference training: TRL's DPOTrainer, whose reference is the base below the mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import trl
from torch import Tensor

from molora.attach import Mixture
from molora.data.collate import side_columns
from molora.data.preference import PairEncoder
from molora.errors import ConfigError
from molora.train import refusals
from molora.train.mixin import MixtureTrainerMixin

_NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class DPOTrainer(MixtureTrainerMixin, trl.DPOTrainer):
    """TRL's DPOTrainer for a model that carries a mixture; see `MixtureTrainerMixin`.

    The reference is the base: log-probabilities of the same model with its mixture turned off, in
    evaluation mode. No second model is loaded, and at B = 0 the loss is that of equal models (ln 2
    for the sigmoid loss). Batches hold the chosen sequences, then the rejected ones; padding is
    masked in each, and side columns (``task_types`` …) are given to both.

    With `args.disable_dropout`, TRL's default, dropout of experts is turned off too.

    Args:
        model: the model that carries `mixture`.
        args: a `trl.DPOConfig`.
        mixture: what `molora.attach` returned.
        aux_losses: add its auxiliary losses, over the tokens of chosen and rejected sequences
            alike. A micro-batch's count by its share of the pairs, as its preference loss does.
        keywords: everything else that the mixin and `trl.DPOTrainer` take, by name. Data sets have
            TRL's columns, or tokens already, from `molora.data.preference.tokenize_pairs`.

    Raises:
        ConfigError: besides the mixin's, settings of which the reference could not be the base.
        AttachError: besides the mixin's, experts on the LM head, which TRL's loss reads past.
    """

    precompute_ref_logps: bool

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        mixture: Mixture,
        aux_losses: bool = False,
        **keywords: Any,
    ) -> None:
        refusals.check_model(model, mixture)
        refusals.check_head(mixture)
        _check_reference(args, keywords, mixture)
        if aux_losses and not mixture.config.losses:
            raise ConfigError(
                "aux_losses=True, but the mixture has no auxiliary losses. Leave it out, or give "
                "the mixture losses."
            )
        self.aux_losses = aux_losses
        # TRL loads a model as the reference unless it is given one; `ref_model` drops this
        super().__init__(model, args, mixture=mixture, **{**keywords, "ref_model": object()})
        if self.args.disable_dropout:
            # TRL turns off modules of dropout alone
            for bank in mixture.built.banks.values():
                bank.dropout = 0.0
        if keywords.get("data_collator") is None:
            self.data_collator = PairedSideColumns(self.data_collator)

    @property
    def ref_model(self) -> None:
        """No model: the reference is the trained one with its mixture off."""
        return

    @ref_model.setter
    def ref_model(self, model: object) -> None:
        pass

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen and of the rejected answers, (B,) each, by the base."""
        forwarded = {k: v for k, v in inputs.items() if k not in _NOT_FOR_THE_MODEL}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with (
            torch.no_grad(),
            self.mixture.disabled(),
            # TRL would turn checkpointing off and on again, without what a mixture needs of it
            _evaluating(self.model),
            self.accelerator.autocast(),
        ):
            out = model(**forwarded, labels=labels, use_cache=False, fused_lm_head=True)
        chosen, rejected = out.log_probs.sum(dim=1).chunk(2)
        return chosen, rejected

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        # TRL takes the reference from the batch where it was computed before
        if "ref_chosen_logps" not in inputs:
            chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = before

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The preference loss, with `aux_losses` plus the weighted auxiliary losses."""
        aux: AbstractContextManager[None] = (
            nullcontext() if self.aux_losses else self.mixture.without_aux()
        )
        with aux:
            return super().compute_loss(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        if set(PairEncoder.COLUMNS) <= set(dataset.column_names or ()):
            return dataset
        return super()._prepare_dataset(dataset, *args)

    def _send_telemetry(self) -> None:
        """Nothing is reported to anybody about a run."""


class PairedSideColumns:
    """A collator that keeps the columns which are for the mixture: `collate`, plus (2B,) tensors.

    Raises:
        DataError: when only some examples have a column.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = side_columns(examples)
        return self.collate(list(examples)) | {n: t.repeat(2) for n, t in columns.items()}


def _check_reference(args: Any, keywords: Mapping[str, Any], mixture: Mixture) -> None:
    if keywords.get("ref_model") is not None:
        raise ConfigError(
            "ref_model: the reference is the base below the mixture, and needs no model of its "
            "own. Leave it out."
        )
    for name, reason in {
        "sync_ref_model": "the reference is the frozen base, which cannot follow the mixture.",
        "ld_alpha": "the reference's log-probabilities are summed whole.",
    }.items():
        if getattr(args, name, None) not in (None, False):
            raise ConfigError(f"{name}={getattr(args, name)!r}: {reason} Leave it out.")
    engine = getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None)
    if engine and args.precompute_ref_log_probs:
        raise ConfigError(
            "precompute_ref_log_probs=True: TRL would put the model into an engine of its own "
            "before DeepSpeed's. Leave it out: the reference costs one forward a batch."
        )
    if any(parameter.requires_grad for parameter in mixture.extras.trainable()):
        raise ConfigError(
            "train_modules and train_tokens are trained in the base itself, so the reference would "
            "change with them. Leave them out, or freeze them: mixture.freeze('other')."
        )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

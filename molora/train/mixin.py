"""What a Hugging Face Trainer needs to train a mixture, as a mixin in front of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from molora.attach import Mixture
from molora.attach.side_inputs import SIDE_COLUMNS
from molora.errors import CheckpointError, ConfigError
from molora.train import refusals
from molora.train.checkpointing import MixtureCheckpointing
from molora.train.observation import Observation

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

ADAPTER = "adapter"
"""Directory below `output_dir` that `save_model()` writes to."""


class MixtureTrainerMixin(_Trainer):
    """Stands in front of a Trainer class: ``class T(MixtureTrainerMixin, transformers.Trainer)``.

    * Auxiliary losses enter the loss here, in `compute_loss`, whichever way the Trainer makes it:
      a micro-batch's count by its share of the batch's supervised tokens, as its cross entropy
      does, so the gradient does not depend on accumulation or on the number of processes.
    * The optimiser holds what the mixture declares, in the groups of `Mixture.parameter_groups`.
    * Checkpoints and `save_model` hold the mixture alone, readable by `molora.load`.
    * Gradient checkpointing is non-re-entrant, with `molora.checkpoint_context`.
    * Logs gain ``aux_loss`` (weighted, a part of ``loss``), ``aux/NAME`` (each term before its
      coefficient), ``load_min``, ``load_max`` and ``dead_experts`` (see `window.load_summary`),
      ``tokens`` (not padding, since the start) and ``tokens_per_second``.

    Attributes:
        mixture: the mixture.
        observation: what is watched on the way, for the logs.

    Args:
        model: the model that carries `mixture`.
        args: the Trainer's arguments.
        mixture: what `molora.attach` returned.
        router_learning_rate, lora_plus_ratio, weight_decay_B, router_weight_decay: as
            `Mixture.parameter_groups` takes them, beside the arguments' learning rate and decay.
        keywords: everything else that the Trainer class takes, by name.

    Raises:
        ConfigError: arguments that would train something else, see `refusals`.
        AttachError: another model; at the start of training, a trained set other than declared.
    """

    optimizer: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        mixture: Mixture,
        router_learning_rate: float | None = None,
        lora_plus_ratio: float | None = None,
        weight_decay_B: float | None = None,
        router_weight_decay: float = 0.0,
        **keywords: Any,
    ) -> None:
        refusals.check_model(model, mixture)
        refusals.check_arguments(args, mixture)
        refusals.check_keywords(keywords, mixture)
        self.mixture = mixture
        self._rates: dict[str, Any] = {
            "router_learning_rate": router_learning_rate,
            "lora_plus_ratio": lora_plus_ratio,
            "weight_decay_B": weight_decay_B,
            "router_weight_decay": router_weight_decay,
        }
        self.observation = Observation(mixture)
        super().__init__(model, args=args, **keywords)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs in one process mean nn.DataParallel, whose replicas drop "
                "the auxiliary losses. Start one process per GPU, or show one GPU with "
                "CUDA_VISIBLE_DEVICES."
            )
        if self.is_fsdp_enabled:
            raise ConfigError(
                "accelerate's configuration turns on FSDP, which is not supported. Use DeepSpeed "
                "ZeRO-3, or plain data parallelism."
            )
        self.add_callback(MixtureCheckpointing())

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, from the start.

        Raises:
            CheckpointError: asked to resume.
        """
        if resume_from_checkpoint:
            raise CheckpointError(
                f"resuming from {resume_from_checkpoint!r} is refused: exact resumption does not "
                "exist yet, and a checkpoint holds the mixture alone, without optimiser, schedule "
                "and data order, so training would silently go on differently. Start a new run; "
                "molora.load takes the mixture of a checkpoint."
            )
        self.observation.reset()
        return super().train(None, *args, **kwargs)

    # ------------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss plus the weighted auxiliary losses, scaled alike."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.mixture.deferred_aux() as deferred, self.observation.watching():
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        # both Trainers multiply a loss per global token by the number of processes, because their
        # gradients are then averaged over these
        per_token = self.args.average_tokens_across_devices and num_items_in_batch is not None
        processes = self.accelerator.num_processes if per_token else 1
        if deferred.forwards:
            loss = loss + processes * deferred.weighted(num_items_in_batch).to(loss.device)
        # a loss that is no sum over tokens is averaged over the accumulation steps by the Trainer
        steps = 1 if num_items_in_batch is not None else self.current_gradient_accumulation_steps
        self.observation.add_micro_batch(
            inputs,
            deferred,
            num_items_in_batch=num_items_in_batch,
            scale=processes / steps,
            device=loss.device,
        )
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; auxiliary losses and side columns take no part."""
        started = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.observation.pause(time.perf_counter() - started)

    # ------------------------------------------------------------------ optimiser

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimiser of the arguments over `mixture.parameter_groups`.

        Raises:
            ConfigError: an optimiser that makes its own groups of parameters.
            AttachError: nothing to train, or not exactly what the mixture declares.
        """
        if self.optimizer is None:
            groups_of = self.optimizer_cls_and_kwargs
            cls, options = groups_of or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options = dict(options)
            rate = options.pop("lr", self.args.learning_rate)
            own_groups = options.keys() & {"params", "model", "optimizer_dict"}
            if own_groups or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
                raise ConfigError(
                    f"optim={self.args.optim!r} makes its own groups of parameters, and would not "
                    "train exactly the mixture. Use an optimiser such as adamw_torch."
                )
            groups = self.mixture.parameter_groups(
                rate, weight_decay=self.args.weight_decay, **self._rates
            )
            self.optimizer = cls(groups, **options)
        refusals.check_trained_set(self.mixture, self.optimizer)
        refusals.check_can_learn(self.mixture)
        return self.optimizer

    # ------------------------------------------------------------------ files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the mixture alone; without a directory, to `output_dir`/adapter."""
        if self.args.should_save:
            self.mixture.save(output_dir or Path(self.args.output_dir) / ADAPTER)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        # the Trainer's own writes the base model, and the rest in files that run code when read
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)

    # ------------------------------------------------------------------ columns and logs

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = columns + [c for c in SIDE_COLUMNS if c not in columns]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what the routers did since the last line to the logs of training."""
        if "loss" in logs:
            logs.update(self._observed())
        elif "train_loss" in logs:
            # the summary of a run whose last steps came after the last line
            self._observed()
        super().log(logs, *args, **kwargs)

    def _observed(self) -> dict[str, float]:
        found = self.observation.read(step=self.state.global_step, accelerator=self.accelerator)
        # on a base that is itself a mixture of experts TRL logs the base's as "aux_loss"
        if getattr(self, "aux_loss_enabled", False) and "aux_loss" in found:
            found["molora_aux_loss"] = found.pop("aux_loss")
        return found

    @property
    def tokens(self) -> int:
        """Number trained on, padding not counted, as of the last log."""
        return self.observation.tokens

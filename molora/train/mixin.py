"""What a Hugging Face Trainer needs to train a mixture, as a mixin in front of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molora.attach import Mixture
from molora.attach.saving import base_fingerprint, save_mixture
from molora.attach.side_inputs import SIDE_COLUMNS, ArgumentReader
from molora.errors import ConfigError
from molora.train import checkpoints, evaluation, filling, quantized, refusals, trackers
from molora.train.checkpointing import MixtureCheckpointing
from molora.train.gather import gathered, gathered_state
from molora.train.guard import RunCallback
from molora.train.metrics import group_rates
from molora.train.observation import DEAD_STEPS, Observation
from molora.train.session import Session

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
    * Rows that only fill up the last batches of several processes are not learnt twice; the loss
      of an evaluation is a mean over the supervised tokens of all rows.
    * The optimiser holds what the mixture declares, in the groups of `Mixture.parameter_groups`.
    * Checkpoints and `save_model` hold the mixture alone, readable by `molora.load`.
    * Gradient checkpointing is non-re-entrant, with `molora.checkpoint_context`.
    * Logs gain what `MetricsWriter` lists. The numbers of every site go to TensorBoard, to W&B and
      to the listeners of `observation`.

    Attributes:
        mixture: the mixture.
        observation: what is watched on the way, for the logs.

    Args:
        model: the model that carries `mixture`.
        args: the Trainer's arguments.
        mixture: what `molora.attach` returned.
        router_learning_rate, lora_plus_ratio, weight_decay_B, router_weight_decay: as
            `Mixture.parameter_groups` takes them, beside the arguments' learning rate and decay.
        dead_steps: optimiser steps after which an expert without tokens, or a site that sends all
            to the same experts, is told in words; None for never.
        keywords: everything else that the Trainer class takes, by name.

    Raises:
        ConfigError: arguments that would train something else, see `refusals`.
        AttachError: another model; at the start of training, a trained set other than declared.
    """

    optimizer: Any
    data_collator: Any
    _signature_columns: Any
    _session: Session

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
        dead_steps: int | None = DEAD_STEPS,
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
        self.observation = Observation(mixture, dead_steps=dead_steps)
        self.base = base_fingerprint(mixture, gather=gathered)
        self._arguments = ArgumentReader(model)
        self._token_mean = evaluation.TokenMean()
        with quantized.known_as_adapted(model):
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
        if self.is_deepspeed_enabled and any(keywords.get("optimizers") or ()):
            raise ConfigError(
                "optimizers=…: with DeepSpeed the Trainer would drop them silently and make AdamW "
                "and a schedule of its own. Pass optimizer_cls_and_kwargs=(class, arguments), and "
                "name the schedule with lr_scheduler_type."
            )
        self.add_callback(MixtureCheckpointing())
        self.add_callback(
            RunCallback(
                begin=lambda: self._session.begin(), is_stopping=lambda: self._session.stopping
            )
        )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; a run that goes on does so exactly.

        Ctrl-C and SIGTERM, as schedulers send it before they take a machine away, end the run after
        the step at hand, with a checkpoint.

        Args:
            resume_from_checkpoint: a directory; True for the newest complete checkpoint in
                `output_dir`, "auto" for that or, if there is none, the beginning.

        Raises:
            CheckpointError: a checkpoint that is damaged, or of another run.
            TrainingError: a loss or gradient that is not finite; the step is not made.
            KeyboardInterrupt: after Ctrl-C; SystemExit after SIGTERM.
        """
        self.observation.reset()
        self._session = session = Session(self, resume_from_checkpoint)
        resumed = session.resumed
        with session.interruption:
            try:
                path = None if resumed is None else str(resumed.directory)
                result = super().train(path, *args, **kwargs)
            finally:
                session.close()
        session.finish()
        return result

    def tell(self, sentence: str) -> None:
        """Say something about the run on stderr, once for all ranks."""
        if self.args.process_index == 0:
            sys.stderr.write(f"{sentence}\n")

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; the order of rows follows from the run's seed alone."""
        # otherwise it is that of whatever seeded torch last, and another one when the run goes on
        if self.args.data_seed is None:
            self.args.data_seed = self.args.seed
        super().create_accelerator_and_postprocess()

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(max_steps, *args, **kwargs)
        # a resumed state still has the intervals of the run before
        self.state.compute_steps(self.args, max_steps)
        return found

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        # without the checkpoint: the Trainer's files of it would run code when they are read
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._session.prepare()
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # the Trainer's would make one more step when a finished run is resumed
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `_prepare_for_training` loads it, with or without an engine."""

    def _load_rng_state(self, checkpoint: Any) -> None:
        self._session.restore_rng()

    def _load_best_model(self) -> None:
        if self._session.stopping:
            return
        directory = Path(self.state.best_model_checkpoint)
        self.tell(f"taking the weights of {directory.name}, the best by {self.state.best_metric}")
        checkpoints.load_mixture(self.mixture, directory)

    # of the two the first that is called; clipping would spread what is not finite to all tensors
    def _clip_grad_norm(self, model: Any) -> Any:
        if not self.is_deepspeed_enabled:
            self._session.check_step()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and not self.is_deepspeed_enabled:
            self._session.check_step()
        return super()._get_grad_norm(model, grad_norm)

    # ------------------------------------------------------------------ loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As the Trainer's; rows that only fill up the end of an epoch are not learnt again."""
        samples, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        if number is not None and filling.fills_up(self.accelerator):
            samples[-1] = filling.without_repeated(samples[-1], self.accelerator)
            number = self._get_num_items_in_batch(samples, device)
        return samples, number

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss plus the weighted auxiliary losses, scaled alike."""
        if not self.model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        with self.mixture.deferred_aux() as deferred, self.observation.watching():
            result = self._task_loss(model, inputs, return_outputs, num_items_in_batch)
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
            scale=processes / (steps * self.accelerator.num_processes),
            device=loss.device,
        )
        # callers may ask for a loss without training
        session: Session | None = getattr(self, "_session", None)
        if session is not None and session.guard is not None:
            session.guard.add_loss(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, *args: Any) -> Any:
        return super().compute_loss(*args)

    def _evaluation_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        found = evaluation.counted(inputs, self._arguments, accelerator=self.accelerator)
        if found is None:
            return super().compute_loss(model, inputs, return_outputs)
        inputs, count = found
        # without num_items_in_batch: the mean over this batch
        result = super().compute_loss(model, inputs, return_outputs)
        self._token_mean.add(result[0] if return_outputs else result, count)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; the loss is a mean over all supervised tokens."""
        self._token_mean = evaluation.TokenMean()
        output = super().evaluation_loop(*args, **kwargs)
        mean = self._token_mean.mean(self.accelerator)
        if mean is not None:
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = mean
        return output

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
        refusals.check_one_dtype(self.mixture, checkpoints.stage(self))
        return self.optimizer

    # ------------------------------------------------------------------ files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the mixture alone; without a directory, to `output_dir`/adapter.

        All ranks call it.
        """
        directory = Path(output_dir or Path(self.args.output_dir) / ADAPTER)
        weights = gathered_state(self.mixture)
        checkpoints.on_first_rank(
            self, lambda: save_mixture(self.mixture, directory, state=weights, base=self.base)
        )

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        checkpoints.save(self)

    # ------------------------------------------------------------------ columns and logs

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = columns + [c for c in SIDE_COLUMNS if c not in columns]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what the routers did since the last line to the logs of training."""
        if "loss" in logs:
            logs.update(self._observed(logs) | group_rates(self.optimizer))
        elif "train_loss" in logs:
            # the summary of a run whose last steps came after the last line
            self._observed(logs)
            if self._session.resumed is not None:
                # all steps over the time since the resumption: not a speed
                logs.pop("train_samples_per_second", None)
                logs.pop("train_steps_per_second", None)
        super().log(logs, *args, **kwargs)
        if "loss" in logs and self.is_world_process_zero():
            trackers.send(self._report, self.callback_handler.callbacks)
            self.observation.publish(self._report)

    def _observed(self, logs: dict[str, float]) -> dict[str, float]:
        self._report = self.observation.read(
            step=self.state.global_step,
            accelerator=self.accelerator,
            grad_norm=logs.get("grad_norm"),
        )
        found = dict(self._report.totals)
        # DeepSpeed without ZeRO has no norm to tell
        if logs.get("grad_norm") is None and self._report.grad_norm is not None:
            found["grad_norm"] = self._report.grad_norm
        # on a base that is itself a mixture of experts TRL logs the base's as "aux_loss"
        if getattr(self, "aux_loss_enabled", False) and "aux_loss" in found:
            found["molora_aux_loss"] = found.pop("aux_loss")
        return found

    @property
    def tokens(self) -> int:
        """Number trained on, padding not counted, as of the last log."""
        return self.observation.tokens

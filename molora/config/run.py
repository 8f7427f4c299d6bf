"""A whole training run as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from molora.config.base import Frozen, unknown_name
from molora.config.data import DataConfig
from molora.config.mixture import MixtureConfig
from molora.config.objective import DPO, SFT, Objective
from molora.config.roles import Role
from molora.config.saved import with_saved_mixture


class ModelConfig(Frozen):
    """The frozen base model."""

    name: str = Field(min_length=1)
    """A name on the Hugging Face hub or a directory."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    """Storage of the base; trainable parameters have `mixture.dtype`."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation."""


class TrainConfig(Frozen):
    """Optimisation and logging."""

    epochs: PositiveFloat = 1.0
    """Passes over the data, unless max_steps is set."""
    max_steps: PositiveInt | None = None
    """Optimiser steps; overrides epochs."""
    batch_size: PositiveInt = 8
    """Rows per process and forward."""
    gradient_accumulation: PositiveInt = 1
    """Forwards per optimiser step."""
    objective: Objective = SFT()
    """What is minimised: `sft`, or `dpo` on preference data."""
    start_from: Path | None = None
    """Directory of a saved mixture with the same experts and routers, whose values the run starts
    with: a stage after another, or preference training after supervised."""
    freeze: tuple[Role, ...] = ()
    """Roles that are not trained: experts (A and B), A, B, router, other (declared modules and
    token rows)."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate of the experts, and of declared modules and token rows."""
    lora_plus_ratio: PositiveFloat | None = None
    """Learning rate of B ÷ that of A (LoRA+, 2402.12354: about 16); equal if not given."""
    router_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the routers; the experts' if not given."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay of the experts and of declared modules."""
    weight_decay_B: NonNegativeFloat | None = None
    """AdamW weight decay of B, instead of weight_decay."""
    router_weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay of the routers."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate schedule after warm-up."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps with a rising learning rate."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass; always non-re-entrant."""
    logging_steps: PositiveInt = 10
    """Optimiser steps between two lines of metrics."""
    save_steps: PositiveInt | None = None
    """Optimiser steps between two checkpoints, from which a run can go on; none but on a signal if
    not given."""
    save_total_limit: PositiveInt | None = None
    """Checkpoints that are kept, the newest and the best among them; all if not given."""
    keep_best: str | None = None
    """Metric of the evaluations, such as eval_loss, whose best checkpoint becomes the adapter;
    lower is better if the name ends in loss. The last step becomes it if not given."""
    dead_steps: PositiveInt | None = 200
    """Optimiser steps after which an alarm tells of an expert that got no token, or of a site that
    sends everything to the same experts; no alarms if null."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides metrics.jsonl. TensorBoard's files are in output_dir/runs; W&B is
    set up by its own environment variables."""
    eval_steps: PositiveInt | None = None
    """Optimiser steps between two evaluations of the loss on data.eval; only at the end if not
    given."""
    threads: PositiveInt | None = None
    """CPU threads; torch's choice if not given."""
    deepspeed: str | None = None
    """zero1, zero2, zero3, zero3_offload, or the path of a JSON file for DeepSpeed, whose name
    ends in .json; plain data parallelism if not given."""
    timeout_seconds: PositiveInt = 1800
    """Longest wait of a process for the others, after which the run stops."""

    @model_validator(mode="after")
    def _best_needs_evaluated_checkpoints(self) -> Self:
        if self.keep_best is None:
            return self
        if not self.keep_best.startswith("eval_"):
            raise ValueError(
                f"keep_best={self.keep_best!r} is no metric of an evaluation: their names begin "
                "with eval_, such as eval_loss."
            )
        if not self.eval_steps or not self.save_steps or self.save_steps % self.eval_steps:
            raise ValueError(
                f"keep_best needs an evaluation at every checkpoint: eval_steps={self.eval_steps} "
                f"must divide save_steps={self.save_steps}. Set both."
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_is_a_stage_or_a_file(self) -> Self:
        names = ["zero1", "zero2", "zero3", "zero3_offload"]
        chosen = self.deepspeed
        if chosen is not None and chosen not in names and not chosen.endswith(".json"):
            hint = unknown_name("name", chosen, names)
            raise ValueError(f"deepspeed: {hint} Or give the path of a JSON file: PATH.json.")
        return self


class RunConfig(Frozen):
    """model, data, mixture and training of one run."""

    model: ModelConfig
    """The frozen base model."""
    data: DataConfig
    """What to train and evaluate on."""
    mixture: MixtureConfig
    """The mixture, or in a file `preset: NAME` and its arguments, or `from: DIR`, a saved one."""
    train: TrainConfig = TrainConfig()
    """Optimisation and logging."""
    output_dir: Path = Path("runs/molora")
    """Where the mixture, metrics and the resolved configuration are written."""
    seed: int = Field(default=0, ge=0)
    """Seeds experts, routers, data order and dropout."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_saved_mixture(cls, data: Any) -> Any:
        return with_saved_mixture(data)

    @model_validator(mode="after")
    def _preferences_fit(self) -> Self:
        objective = self.train.objective
        if not isinstance(objective, DPO):
            return self
        if self.data.packing:
            raise ValueError(
                "data.packing and train.objective: dpo exclude each other: a pair's two answers "
                "are two sequences of one batch, and are compared row by row. Turn packing off."
            )
        if objective.aux_losses and not self.mixture.losses:
            raise ValueError(
                "train.objective.aux_losses is set, but the mixture has no losses. Give it some, "
                "or leave aux_losses out."
            )
        trained = self.mixture.train_modules or self.mixture.train_tokens
        if trained and "other" not in self.train.freeze:
            raise ValueError(
                "train.objective: dpo compares with the base, in which mixture.train_modules and "
                "train_tokens train. Leave them out, or freeze them: train.freeze: [other]."
            )
        return self

    @model_validator(mode="after")
    def _eval_steps_need_data(self) -> Self:
        if self.train.eval_steps is not None and not self.data.eval:
            raise ValueError(
                "train.eval_steps is set, but data.eval is empty. Name evaluation files or drop it."
            )
        return self

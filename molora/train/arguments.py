"""A run's configuration → the arguments of TRL's trainer."""

from __future__ import annotations

import os
from typing import Any

import torch

from molora.config.run import RunConfig, TrainConfig
from molora.train import checkpointing
from molora.train.deepspeed_config import deepspeed_config


def trainer_arguments(config: RunConfig) -> dict[str, Any]:
    """Keyword arguments for `trl.SFTConfig` and `trl.DPOConfig`; what TRL would choose by itself is
    said."""
    train = config.train
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "output_dir": str(config.output_dir),
        "seed": config.seed,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        checkpointing.ARGUMENT: train.gradient_checkpointing,
        "logging_steps": train.logging_steps,
        # the default writes the average of earlier losses in place of one that is not finite
        "logging_nan_inf_filter": False,
        **_schedule(train),
        **_every("save", train.save_steps),
        "save_total_limit": train.save_total_limit,
        "metric_for_best_model": train.keep_best,
        "load_best_model_at_end": train.keep_best is not None,
        **_every("eval", train.eval_steps if config.data.eval else None),
        # the base has model.dtype and the trainables have mixture.dtype: nothing is autocast
        "bf16": False,
        "fp16": False,
        # said, or several processes without a GPU would each train the whole by itself
        "use_cpu": not torch.accelerator.is_available(),
        # experts are stacked: none is ever without a gradient
        "ddp_find_unused_parameters": False,
        "ddp_timeout": train.timeout_seconds,
        "deepspeed": deepspeed_config(config, world_size=processes),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": list(train.report_to) or "none",
        "disable_tqdm": True,
    }


def _schedule(train: TrainConfig) -> dict[str, Any]:
    # transformers' "constant" has no warm-up, and its warmup_steps is a share only below 1
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return {"lr_scheduler_type": name, "warmup_steps": min(train.warmup_ratio, 1 - 1e-9)}


def _every(what: str, steps: int | None) -> dict[str, Any]:
    if steps is None:
        return {f"{what}_strategy": "no"}
    return {f"{what}_strategy": "steps", f"{what}_steps": steps}

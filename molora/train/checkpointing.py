"""Activation checkpointing through a Trainer, as a mixture needs it.

transformers 5.20 renamed it from gradient to activation checkpointing; the older names are for the
versions before.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from molora.attach import checkpoint_context
from molora.errors import ConfigError

_NEW = "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}
ARGUMENT = "activation_checkpointing" if _NEW else "gradient_checkpointing"
"""The training argument that turns it on."""


def check_settings(args: Any) -> None:
    """Raise ConfigError for settings that would train something else."""
    settings = _settings(args)
    if settings.get("use_reentrant"):
        raise ConfigError(
            "use_reentrant=True: re-entrant gradient checkpointing silently drops the gradient of "
            "auxiliary losses. Leave it out; molora.train sets what is needed."
        )
    for name in ("selective", "context_fn"):
        if settings.get(name):
            raise ConfigError(
                f"gradient_checkpointing_kwargs: {name!r} takes the place of "
                "molora.checkpoint_context, which recomputed layers need. Leave it out."
            )


class MixtureCheckpointing(TrainerCallback):
    """Turns it on again after the Trainer did, with `molora.checkpoint_context`.

    Not through the Trainer's arguments: these are logged as JSON, which has no functions.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not getattr(args, ARGUMENT):
            return
        settings = _settings(args)
        placing = {k: settings.pop(k) for k in ("every_n_layers", "offload") if k in settings}
        required = {"use_reentrant": False, "context_fn": checkpoint_context}
        enable = getattr(kwargs["model"], f"{ARGUMENT}_enable")
        enable({**settings, **required}, **placing)


def disable(model: Any) -> None:
    """Turn it off, if it is on."""
    if getattr(model, f"is_{ARGUMENT}"):
        getattr(model, f"{ARGUMENT}_disable")()


def _settings(args: Any) -> dict[str, Any]:
    return dict(getattr(args, f"{ARGUMENT}_kwargs", None) or {})

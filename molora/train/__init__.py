"""Training: a mixin for Hugging Face trainers, and whole runs from one configuration."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molora.train.dpo import DPOTrainer
    from molora.train.mixin import MixtureTrainerMixin
    from molora.train.run import TrainResult, train
    from molora.train.trainer import SFTTrainer, Trainer

# trl takes six seconds to import: a dry run must not pay for it
_HOMES = {
    "DPOTrainer": "molora.train.dpo",
    "MixtureTrainerMixin": "molora.train.mixin",
    "SFTTrainer": "molora.train.trainer",
    "TrainResult": "molora.train.run",
    "Trainer": "molora.train.trainer",
    "train": "molora.train.run",
}

__all__ = ["DPOTrainer", "MixtureTrainerMixin", "SFTTrainer", "TrainResult", "Trainer", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

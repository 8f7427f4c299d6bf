"""molora: mixtures of LoRA experts on unmodified Hugging Face models."""

from molora import presets
from molora.attach import Mixture, attach, checkpoint_context, load
from molora.compose import compose, load_experts
from molora.config import MixtureConfig
from molora.errors import (
    AttachError,
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    MoLoRAError,
    TrainingError,
)
from molora.presets import load_config, methods
from molora.routing import Routing
from molora.version import VERSION as __version__

__all__ = [
    "AttachError",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Mixture",
    "MixtureConfig",
    "MoLoRAError",
    "TrainingError",
    "Routing",
    "__version__",
    "attach",
    "checkpoint_context",
    "compose",
    "load",
    "load_config",
    "load_experts",
    "methods",
    "presets",
]

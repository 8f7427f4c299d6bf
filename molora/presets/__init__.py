"""One function per published method, each returning a `MixtureConfig`."""

from molora.presets.ffn import mixlora
from molora.presets.load import load_config, mixture_config, run_config
from molora.presets.lora import lora, molora
from molora.presets.registry import PRESETS, methods
from molora.presets.token import loramoe, mola

__all__ = [
    "PRESETS",
    "load_config",
    "lora",
    "loramoe",
    "methods",
    "mixlora",
    "mixture_config",
    "mola",
    "molora",
    "run_config",
]

"""The table of presets."""

from __future__ import annotations

from collections.abc import Callable

from molora.config import MixtureConfig
from molora.presets.ffn import mixlora
from molora.presets.lora import lora, molora
from molora.presets.token import loramoe, mola

PRESETS: dict[str, Callable[..., MixtureConfig]] = {
    "lora": lora,
    "molora": molora,
    "mola": mola,
    "loramoe": loramoe,
    "mixlora": mixlora,
}
"""Preset name → function. Adding a method adds a line."""


def methods() -> dict[str, str]:
    """Preset name → one-line description with its paper."""
    return {
        name: (preset.__doc__ or "").strip().splitlines()[0] for name, preset in PRESETS.items()
    }

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
    return {name: _summary(preset) for name, preset in PRESETS.items()}


def _summary(preset: Callable[..., MixtureConfig]) -> str:
    """The first paragraph of its docstring, on one line."""
    return " ".join((preset.__doc__ or "").strip().partition("\n\n")[0].split())

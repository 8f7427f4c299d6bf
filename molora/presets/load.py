"""YAML files → configurations; a mixture may be written as a preset and its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora.config import MixtureConfig
from molora.config.base import unknown_name
from molora.config.run import RunConfig
from molora.config.yaml import read_yaml
from molora.errors import ConfigError
from molora.presets.assemble import arguments_of
from molora.presets.registry import PRESETS


def load_config(path: str | Path) -> RunConfig:
    """Read a run from a YAML file; relative paths in it are relative to the working directory.

    Raises:
        ConfigError: unreadable YAML, unknown keys or impossible values, each with its path.
    """
    return run_config(read_yaml(Path(path)))


def run_config(data: Mapping[str, Any]) -> RunConfig:
    """A run from plain data, in which the mixture may be a preset.

    Raises:
        ConfigError: unknown keys or impossible values, each with its path.
    """
    mixture = data.get("mixture")
    if isinstance(mixture, Mapping) and "preset" in mixture:
        data = {**data, "mixture": mixture_config(mixture)}
    return RunConfig.parse(data)


def mixture_config(data: Any) -> MixtureConfig:
    """A mixture from its fields, or from `preset: NAME` and that preset's arguments.

    Raises:
        ConfigError: unknown presets, arguments or keys.
    """
    if not isinstance(data, Mapping) or "preset" not in data:
        return MixtureConfig.parse(data)
    arguments = dict(data)
    name = arguments.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"mixture.preset: {unknown_name('preset', str(name), PRESETS)}")
    preset = PRESETS[name]
    known = arguments_of(preset)
    for key in arguments:
        if key not in known:
            raise ConfigError(f"mixture: {unknown_name('key', str(key), known)}")
    try:
        return preset(**arguments)
    except ConfigError as error:
        raise ConfigError(f"mixture (preset {name}): {error}") from None

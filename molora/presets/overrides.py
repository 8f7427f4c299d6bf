"""``train.learning_rate=1e-3`` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molora.config.run import RunConfig
from molora.config.yaml import parse_yaml, read_yaml
from molora.errors import ConfigError
from molora.presets.load import run_config


def load_run(path: Path, overrides: Sequence[str], *, output_dir: Path | None) -> RunConfig:
    """The run in a YAML file, with some of its values replaced before they are checked.

    Args:
        overrides: ``key.path=value``; the value is YAML, a number in the path is a place in a list.
        output_dir: replaces `output_dir`.

    Raises:
        ConfigError: an override that is not of this form or leads nowhere, and every fault of the
            resulting configuration.
    """
    data = replaced(read_yaml(path), overrides)
    if output_dir is not None:
        data = {**data, "output_dir": str(output_dir)}
    return run_config(data)


def replaced(data: Any, overrides: Sequence[str]) -> Any:
    """A copy of plain data with the values that `overrides` give; errors as `load_run`."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"{override!r} is not of the form key.path=value, such as "
                "train.learning_rate=1e-3. Options begin with --."
            )
        data = _replaced(data, key.split("."), _value(override, text), override)
    return data


def _value(override: str, text: str) -> Any:
    try:
        return parse_yaml(f"value: {text}")["value"]
    except ConfigError:
        raise ConfigError(
            f"{override!r}: the value is not valid YAML. Lists are written [a, b], and text with "
            "a colon or a bracket in quotes: 'key=\"a: b\"'."
        ) from None


def _replaced(data: Any, path: list[str], value: Any, override: str) -> Any:
    """A copy of `data` with the value at `path`; mappings that are not there yet are made."""
    if not path:
        return value
    key, *rest = path
    if isinstance(data, list):
        if not key.isdecimal() or int(key) >= len(data):
            raise ConfigError(
                f"{override!r}: {key!r} is no place in a list of {len(data)}; the first is 0."
            )
        place = int(key)
        return [
            *data[:place],
            _replaced(data[place], rest, value, override),
            *data[place + 1 :],
        ]
    if data is None or isinstance(data, dict):
        known = data or {}
        return {**known, key: _replaced(known.get(key), rest, value, override)}
    raise ConfigError(
        f"{override!r}: there is no {key!r} in {data!r}, which is a value and not a mapping."
    )

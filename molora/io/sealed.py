"""Configuration values as JSON files that carry a checksum over themselves.

The checksum covers every value, because a changed number would be read without another sign of
damage; layout and order of the text are free.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from molora.config.base import Frozen
from molora.errors import CheckpointError, ConfigError

CHECKSUM = "checksum"
MAX_JSON = 2**27
"""Bytes of the largest JSON file that is read, about a million lines of a training log."""
Model = TypeVar("Model", bound=Frozen)


def dump(value: Frozen) -> str:
    """The text of the file."""
    data = value.model_dump(mode="json")
    return json.dumps({**data, CHECKSUM: _checksum(data)}, indent=2) + "\n"


def parse(text: str, kind: type[Model], *, where: str, newest: int, remedy: str) -> Model:
    """The checked value of a file whose format version is at most `newest`.

    `where` is the file's name for messages, `remedy` a sentence on what to do if it was changed.

    Raises:
        CheckpointError: damaged text, unknown keys, a newer format, values that were changed.
    """
    data = parse_json(text, where=where)
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is damaged: {type(data).__name__}, not a dict.")
    version = data.get("format_version")
    if isinstance(version, int | float) and version > newest:
        raise CheckpointError(
            f"{where} has format version {version}; this molora reads up to {newest}. "
            "Upgrade molora."
        )
    stated = data.pop(CHECKSUM, None)
    try:
        value = kind.parse(data)
    except ConfigError as error:
        raise CheckpointError(f"{where} is damaged: {printable(str(error))}") from None
    if stated != _checksum(data):
        raise CheckpointError(
            f"{where} does not have the checksum that it states: a value was changed or damaged. "
            + remedy
        )
    return value


def parse_json(text: str, *, where: str) -> Any:
    """Any JSON value.

    Raises:
        CheckpointError: text that is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    # ValueError: text that is no JSON, and integers of too many digits
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not readable JSON: {error}.") from None


def read_text(path: Path) -> str:
    """The text of a JSON file that is to be parsed.

    Raises:
        CheckpointError: a file that cannot be read, or is larger than any of ours.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise CheckpointError(
                f"{path} has {size} bytes, and a JSON file of ours at most {MAX_JSON}. It is "
                "damaged, or not one of ours."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from None


def printable(text: str) -> str:
    """Without the control characters that a damaged or hostile file could send to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _checksum(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

"""Settings in small files of other programs: bounded in size, checked value by value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, StrictFloat, StrictInt, StringConstraints

from molora.config.base import Frozen
from molora.errors import CheckpointError, ConfigError
from molora.io.peft_config import MAX_CONFIG
from molora.io.sealed import parse_json, printable, read_text

Model = TypeVar("Model", bound=Frozen)
Count = Annotated[StrictInt, Field(ge=1, le=2**20)]
"""A size or a number of things."""
Number = Annotated[StrictInt | StrictFloat, Field(ge=-1e6, le=1e6)]
Positive = Annotated[StrictInt | StrictFloat, Field(gt=0, le=1e6)]
Text = Annotated[str, StringConstraints(strict=True, max_length=4096)]


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: a file that is missing, too large, or has something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file.")
    if path.stat().st_size > MAX_CONFIG:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, and at most {MAX_CONFIG} are read."
        )
    data = parse_json(read_text(path), where=str(path))
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: {type(data).__name__}, not a dict.")
    return data


def parsed(kind: type[Model], data: object, *, where: str) -> Model:
    """The checked settings.

    Raises:
        ConfigError: unknown settings, or values that cannot be.
    """
    try:
        return kind.parse(data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {printable(str(error))[:2000]}") from None
    except RecursionError:
        raise CheckpointError(f"{where} is damaged: its values are nested too deeply.") from None


def known_of(
    kind: type[Frozen], data: Mapping[str, Any], *, also: Iterable[str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """(settings that `kind` has, notes on unknown ones); `also` are known and mean nothing here.

    Raises:
        ConfigError: an unknown setting of a name that changes what is computed.
    """
    known, notes = {}, []
    for key, value in data.items():
        if key in kind.model_fields:
            known[key] = value
        elif key not in also:
            if value and (key.startswith(("use_", "enable_")) or key.endswith("_config")):
                raise ConfigError(
                    f"{where}: {key[:80]!a} is unknown to this version of molora, and settings "
                    "called so change what is computed. Upgrade molora."
                )
            notes.append(f"unknown setting {key[:80]!a} was not read")
    return known, notes

"""The base of every configuration model: frozen, and strict about names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from molora.errors import ConfigError


class Frozen(BaseModel):
    """An immutable value whose unknown keys are errors that name the nearest known key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(unknown_name("key", str(key), cls.model_fields))
        return data

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Validate plain data.

        Raises:
            ConfigError: with one line per fault, each starting with the path of the faulty value.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(describe(error)) from None


def unknown_name(what: str, name: str, known: Mapping[str, Any] | list[str]) -> str:
    """``unknown key 'rnak'. Close names: rank.`` or, with nothing close, the whole list."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"Close names: {', '.join(close)}." if close else f"Known: {', '.join(known)}."
    return f"unknown {what} {name!r}. {hint}"


def describe(error: ValidationError) -> str:
    """One line per fault: ``mixture.groups.0.select: …``."""
    faults = error.errors(include_url=False, include_context=False)
    lines = []
    for fault in faults:
        # a container is reported as too short when all its items are faulty: only the items' faults
        # help
        if any(
            other["loc"][: len(fault["loc"])] == fault["loc"] and other is not fault
            for other in faults
        ):
            continue
        path = ".".join(str(part) for part in fault["loc"]) or "config"
        message = fault["msg"].removeprefix("Value error, ")
        shown = repr(fault["input"])
        value = f" (got {shown})" if len(shown) < 80 and "unknown" not in message else ""
        lines.append(f"{path}: {message}{value}")
    return "\n".join(lines)

"""Values that were given as KEY=VALUE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molora.errors import ConfigError


def check_values(section: str, values: Any, types: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that is not of its type; names are checked elsewhere."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(values, Mapping):
        raise ConfigError(f"{section}={values!r}: give its settings, as {section}.KEY=VALUE.")
    for name, value in values.items():
        try:
            TypeAdapter(types.get(name, Any)).validate_python(value)
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(f"{section}.{name}={value!r}: {reason}.") from None

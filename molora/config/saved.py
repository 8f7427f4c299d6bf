"""`mixture: {from: DIR}` in a run: the mixture that is saved there, to be trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora.config.base import unknown_name
from molora.config.mixture import MixtureConfig
from molora.errors import ConfigError

FROM = "from"
MANIFEST = "molora.json"
"""The file of a saved mixture that has its configuration."""
MAX_BYTES = 2**27
REPLACED = ("losses", "backend", "share_products")
"""Fields that only training and speed hang on, which a run may have another way."""


def with_saved_mixture(run: Any) -> Any:
    """A run as plain data, with the saved mixture's configuration in place of `from`, and its
    directory as `train.start_from`; another run as it is.

    The configuration is taken as it stands: whoever loads the values from there compares it with
    the file's checksums.

    Raises:
        ConfigError: no saved mixture there, fields that cannot differ from its own.
    """
    mixture = run.get("mixture") if isinstance(run, Mapping) else None
    if not isinstance(mixture, Mapping) or FROM not in mixture:
        return run
    given = dict(mixture)
    directory = Path(str(given.pop(FROM)))
    for name in given:
        if name not in REPLACED:
            hint = unknown_name("key", str(name), list(REPLACED))
            raise ConfigError(f"mixture: {hint} Beside `from` only these may be given.")
    train = run.get("train") or {}
    if not isinstance(train, Mapping):
        return run
    start = train.get("start_from")
    if start is not None and Path(str(start)) != directory:
        raise ConfigError(
            f"mixture.from={str(directory)!r} and train.start_from={str(start)!r} are two places "
            "to start from. Give one."
        )
    return {
        **run,
        "mixture": {**saved_config(directory).model_dump(), **given},
        "train": {**train, "start_from": str(directory)},
    }


def saved_config(directory: Path) -> MixtureConfig:
    """The configuration of the mixture that is saved in a directory.

    Raises:
        ConfigError: a directory without one, or one that cannot be read.
    """
    path = directory / MANIFEST
    remedy = "Give the directory of a saved mixture; that of a run is its adapter/."
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        found = json.loads(text) if len(text) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"mixture.from: {path} cannot be read: {reason}. {remedy}") from None
    mixture = found.get("mixture") if isinstance(found, dict) else None
    if mixture is None:
        raise ConfigError(f"mixture.from: {path} describes no mixture. {remedy}")
    return MixtureConfig.parse(mixture)

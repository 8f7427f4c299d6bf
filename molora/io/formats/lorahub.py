"""Weights that LoraHub (arXiv 2307.13269) found, as JSON.

Its package returns them as an array beside the list of modules and stores neither. So both ways to
write that down are read: {"modules": [name, …], "weights": [number, …]} and {name: number, …}.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from pydantic import Field, StrictFloat, StrictInt

from molora.config.base import Frozen
from molora.errors import ConfigError
from molora.io.formats.parsing import Text, json_object, parsed

MAX_WEIGHT = 1e3
"""The search keeps to ±1.5."""


class _Weights(Frozen):
    modules: list[Text] = Field(min_length=1, max_length=4096)
    weights: list[Annotated[StrictInt | StrictFloat, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]]


def read_lorahub_weights(path: Path) -> MappingProxyType[str, float]:
    """name → weight, in the order of the file.

    Raises:
        CheckpointError: a file that is missing or damaged.
        ConfigError: weights that are no numbers of at most 1,000, not one for each module, or a
            module twice.
    """
    data = json_object(path)
    if not {*data} & {"modules", "weights"}:
        data = {"modules": list(data), "weights": list(data.values())}
    found = parsed(_Weights, data, where=str(path))
    if len(found.weights) != len(found.modules) or len({*found.modules}) < len(found.modules):
        raise ConfigError(
            f"{path} has {len(found.weights)} weights for {len({*found.modules})} different "
            f"modules of {len(found.modules)}. Give one weight for each module."
        )
    return MappingProxyType(dict(zip(found.modules, map(float, found.weights), strict=True)))

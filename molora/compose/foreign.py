"""Routers of other packages' files, as `molora.compose` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molora.errors import ConfigError
from molora.io.formats.arrow import read_arrow
from molora.io.formats.lorahub import read_lorahub_weights
from molora.io.formats.mergoo import read_mergoo
from molora.io.formats.parsing import json_object
from molora.io.peft_files import CONFIG


def router_from(path: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """The router that a file of package peft (Arrow), LoraHub or mergoo describes.

    Args:
        path: the directory of package peft's Arrow router or its `adapter_config.json`; LoraHub's
            weights as JSON; mergoo's settings, or the `config.json` of what it composed.
        names: the experts in order.

    Raises:
        ConfigError: a file of none of these, or for other experts.
        CheckpointError: a file that is missing or damaged.
    """
    path = Path(path)
    directory = path.parent if path.name == CONFIG else path
    if directory.is_dir() and (directory / CONFIG).exists():
        return _arrow(directory)
    if path.suffix == ".json" and "num_experts_per_tok" not in json_object(path):
        return _lorahub(path, names)
    if path.suffix in (".json", ".yaml", ".yml"):
        return _mergoo(path, names)
    raise ConfigError(
        f"{path} describes no router: give package peft's arrow_router directory, LoraHub's "
        "weights (.json), or mergoo's settings (.yaml, .json)."
    )


def _arrow(directory: Path) -> dict[str, Any]:
    settings = read_arrow(directory)
    if settings.use_gks:
        raise ConfigError(
            f"{directory}: use_gks takes the mean of general experts from each expert first. Do it "
            "with molora.compose.general.subtract_general, and compose what it returns."
        )
    return {
        "kind": "arrow",
        "top_k": settings.top_k,
        "temperature": settings.router_temperature,
    }


def _lorahub(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The exact combination; LoraHub's own mixes factors, which `merge(method="factor")` does."""
    weights = dict(read_lorahub_weights(path))
    if set(weights) != set(names):
        differing = ", ".join(sorted(set(weights) ^ set(names))[:3])
        raise ConfigError(
            f"{path} has weights for other experts than were given: {differing[:200]}. Give each "
            "expert the name that it has there."
        )
    return {"kind": "fixed", "weights": weights}


def _mergoo(path: Path, names: Sequence[str]) -> dict[str, Any]:
    settings = read_mergoo(path)
    if settings.num_experts != len(names):
        raise ConfigError(
            f"{path} is about {settings.num_experts} experts, and {len(names)} were given."
        )
    return {"kind": "linear", "top_k": settings.num_experts_per_tok}

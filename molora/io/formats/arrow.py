"""Arrow as package peft stores it: settings of a router, in an adapter that has no other use.

The prototypes are not stored; they follow from the experts (arXiv 2405.11157, and with
`use_gks` arXiv 2505.10939).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, StrictBool, StrictInt

from molora.config.base import Frozen
from molora.errors import ConfigError
from molora.io.formats.parsing import Count, Positive, Text, json_object, parsed
from molora.io.peft_files import CONFIG, inside


class ArrowSettings(Frozen):
    """`arrow_config`, by its names there."""

    top_k: Count = 3
    """Experts for each token."""
    router_temperature: Positive = 1.0
    """Softmax over the chosen |x·prototype| divided by it."""
    use_gks: StrictBool = False
    """GenKnowSub: the mean of general experts is taken from each expert first."""
    task_adapter_names: list[Text] | None = None
    """Experts in order, as peft called them: task_0, …"""
    gks_adapter_names: list[Text] | None = None
    """General experts: gks_0, …"""
    rng_seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    """Of peft's power iteration; prototypes here are exact and need none."""


def read_arrow(directory: Path) -> ArrowSettings:
    """The router's settings in the directory that package peft saved it to ("arrow_router").

    Raises:
        CheckpointError: a file that is missing or damaged.
        ConfigError: an adapter that is no such router, or settings that cannot be.
    """
    path = inside(directory, CONFIG, what="an Arrow router", parts=CONFIG)
    data = json_object(path)
    found = data.get("arrow_config")
    if data.get("peft_type") != "LORA" or not isinstance(found, dict):
        raise ConfigError(
            f"{path} has no arrow_config: it is an adapter, not a router of package peft. Give "
            "the sub-directory arrow_router."
        )
    return parsed(ArrowSettings, found, where=f"{path}: arrow_config")

"""mergekit-moe's YAML: prompts that say what each expert is for, to start a router from.

Its experts are whole models; here the names it gives are matched with adapters by the caller, and
the prompts give each expert's row of a router (mergekit 0.1.5: the normalised difference of the
mean hidden states of positive and negative prompts).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictFloat, StrictInt

from molora.config.base import Frozen
from molora.config.yaml import read_yaml
from molora.errors import ConfigError
from molora.io.formats.parsing import Count, Text, parsed

Prompt = Annotated[str, Field(max_length=100_000)]
RANDOM = ("random", "uniform_random")


class Prompts(Frozen):
    """One expert."""

    source_model: Text
    """Its model, or "base+adapter", as the file says; nothing is opened because of it."""
    positive_prompts: tuple[Prompt, ...] = Field(default=(), max_length=4096)
    """What it is for."""
    negative_prompts: tuple[Prompt, ...] = Field(default=(), max_length=4096)
    """What it is not for."""
    noise_scale: Annotated[StrictInt | StrictFloat, Field(ge=0, le=1e3)] | None = None
    """Of dense experts, not used here."""
    residual_scale: Annotated[StrictInt | StrictFloat, Field(ge=-1e3, le=1e3)] | None = None
    """Of dense experts, not used here."""

    @property
    def adapter(self) -> str | None:
        """What follows the plus in `source_model`."""
        _, plus, adapter = self.source_model.partition("+")
        return adapter if plus else None


class PromptSettings(Frozen):
    """The file, by its names."""

    base_model: Text
    """Whose hidden states or embeddings are taken."""
    experts: tuple[Prompts, ...] = Field(min_length=1, max_length=4096)
    """In order."""
    gate_mode: Literal[
        "hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"
    ] = "hidden"
    """Where a row comes from."""
    experts_per_token: Count = 2
    """Experts for each token."""
    dtype: Text | None = None
    """Of what mergekit would write."""
    architecture: Text | None = None
    """Of what mergekit would write."""


def read_mergekit_prompts(path: Path) -> PromptSettings:
    """The experts and their prompts, checked as mergekit checks them.

    Raises:
        ConfigError: no such file, settings that cannot be, shared experts, an expert without
            positive prompts where rows are made of them, or the same prompts for all.
    """
    data: dict[str, Any] = read_yaml(path)
    where = str(path)
    if data.pop("shared_experts", None):
        raise ConfigError(
            f"{where}: shared_experts act on every token, which no router decides. Leave them out."
        )
    experts = data.get("experts")
    if isinstance(experts, list):  # null is how YAML writes that there are none
        data["experts"] = [
            {key: value for key, value in expert.items() if value is not None}
            if isinstance(expert, dict)
            else expert
            for expert in experts
        ]
    settings = parsed(PromptSettings, data, where=where)
    if settings.experts_per_token > len(settings.experts):
        raise ConfigError(
            f"{where}: experts_per_token is {settings.experts_per_token}, of "
            f"{len(settings.experts)} experts."
        )
    if settings.gate_mode in RANDOM:
        return settings
    for number, expert in enumerate(settings.experts):
        if not expert.positive_prompts:
            raise ConfigError(f"{where}: expert {number} has no positive_prompts. Give some.")
    kinds = {(expert.positive_prompts, expert.negative_prompts) for expert in settings.experts}
    if len(kinds) == 1 and len(settings.experts) > 1:
        raise ConfigError(
            f"{where}: the prompts of all experts are the same, so that nothing tells them apart."
        )
    return settings

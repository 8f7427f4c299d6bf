"""mergoo 0.0.10: the settings from which it composes adapters, and those in what it composed.

Its router is one linear layer without bias for each adapted module, softmax over the chosen
experts, y = W x + Σ gate · scaling · B A x. What it composed holds the base too; the experts are
read from their own directories.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molora.config.base import Frozen
from molora.config.yaml import read_yaml
from molora.errors import ConfigError
from molora.io.formats.parsing import Count, Text, json_object, parsed


class MergooExpert(Frozen):
    """One adapter."""

    expert_name: Text
    """Its name."""
    model_id: Text
    """Directory or id of the hub, as the file says; nothing is opened because of it."""


class MergooSettings(Frozen):
    """What both kinds of files say."""

    num_experts_per_tok: Count
    """Experts for each token."""
    num_experts: Count
    """E."""
    base_model: Text | None = None
    """The base; not in what was composed."""
    experts: tuple[MergooExpert, ...] = ()
    """In order; not in what was composed."""
    router_layers: tuple[Text, ...] | None = None
    """Last parts of adapted modules' names; None: those of the adapters."""
    router_layers_index: tuple[int, ...] = ()
    """Layers that are adapted; none said: all."""


def read_mergoo(path: Path) -> MergooSettings:
    """The settings of a YAML or JSON file to compose from, or of a composed `config.json`.

    Raises:
        CheckpointError: a JSON file that is missing or damaged.
        ConfigError: a YAML file that is, a mixture of whole models, or settings that cannot be.
    """
    data = read_yaml(path) if path.suffix in (".yaml", ".yml") else json_object(path)
    where = str(path)
    composed = data.get("adapter_configs")
    found: dict[str, Any] = {
        key: data[key]
        for key in ("num_experts_per_tok", "router_layers", "router_layers_index")
        if data.get(key) is not None
    }
    if isinstance(composed, list):
        found["num_experts"] = data.get("num_experts")
        settings = parsed(MergooSettings, found, where=where)
        if settings.num_experts != len(composed):
            raise ConfigError(
                f"{where}: num_experts is {settings.num_experts}, but there are {len(composed)} "
                "adapter_configs. The file is damaged."
            )
    else:
        if not data.get("base_model") or not data.get("experts"):
            raise ConfigError(
                f"{where} has no base_model with experts, and no adapter_configs: mergoo mixes "
                "adapters only with a base_model, and other mixtures hold whole models."
            )
        experts = data["experts"]
        found |= {"base_model": data["base_model"], "experts": experts}
        found["num_experts"] = len(experts) if isinstance(experts, list) else None
        settings = parsed(MergooSettings, found, where=where)
        names = [expert.expert_name for expert in settings.experts]
        if len({*names}) < len(names):
            raise ConfigError(f"{where}: two experts have one expert_name. Rename one.")
    if settings.num_experts_per_tok > settings.num_experts:
        raise ConfigError(
            f"{where}: num_experts_per_tok is {settings.num_experts_per_tok}, of "
            f"{settings.num_experts} experts."
        )
    return settings

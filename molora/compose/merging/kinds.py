"""Which experts are a fixed sum of factors, so that they can be merged or compressed."""

from __future__ import annotations

from molora.errors import ConfigError
from molora.io.peft_adapter import Adapter
from molora.io.peft_keys import examples


def check_fixed_update(name: str, adapter: Adapter) -> None:
    """Raises ConfigError for an expert that adds something else than scaling · (B A x + bias)."""
    if adapter.invocation_tokens is not None:
        raise ConfigError(
            f"{name} is an activated LoRA, which acts only after its invocation tokens; no fixed "
            "update does. Leave it out, or route to it."
        )
    if adapter.parameters:
        raise ConfigError(
            f"{name} adapts stacked weights of the base's own experts, "
            f"{examples(adapter.parameters)}, which are not merged or compressed. Leave it out."
        )
    if any(module.magnitude is not None for module in adapter.modules.values()):
        raise ConfigError(
            f"{name} uses DoRA, which scales the rows of the base's weight; no sum of factors "
            "does. Leave it out, or merge it into the base first."
        )

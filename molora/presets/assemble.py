"""What presets share: the types of their arguments, a group of LoRA experts, and the last step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from molora.config import Loss, MixtureConfig
from molora.config.base import unknown_name
from molora.errors import ConfigError

Count = int | Sequence[int] | str
"""An int, one int per layer, or the name of a shape such as "inverted_triangle"."""
Targets = str | Sequence[str]
"""`attention`, `ffn`, `all`, name suffixes, or `re:` and a regular expression."""
Preset = Callable[..., MixtureConfig]


def lora_group(
    *, targets: Targets, num_experts: Count, rank: Count, alpha: float, dropout: float, **rest: Any
) -> dict[str, Any]:
    """A group of independent LoRA experts; `rest` are further fields of `Group`."""
    expert = {"kind": "lora", "alpha": alpha, "dropout": {"p": dropout}}
    return {
        "targets": targets,
        "num_experts": num_experts,
        "rank": rank,
        "expert": expert,
        **rest,
    }


def assemble(
    preset: Preset,
    *groups: Mapping[str, Any],
    losses: Sequence[Loss] = (),
    options: Mapping[str, Any],
) -> MixtureConfig:
    """The mixture of a preset, named after it; `options` are other fields of `MixtureConfig`.

    Raises:
        ConfigError: an option that is neither an argument of the preset nor such a field, and
            every impossible value.
    """
    known = arguments_of(preset)
    for name in options:
        if name not in known:
            raise ConfigError(f"{preset.__name__}: {unknown_name('argument', name, known)}")
    fields = {"method": preset.__name__, "groups": groups, "losses": losses}
    return MixtureConfig.parse({**fields, **options})


def arguments_of(preset: Preset) -> list[str]:
    """Names that a preset takes: its own arguments, then the fields that it leaves open."""
    parameters = inspect.signature(preset).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    taken = {"method", "groups", *own}
    return own + [field for field in MixtureConfig.model_fields if field not in taken]

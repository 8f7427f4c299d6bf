"""The modules that an adapter's configuration names, against those that its tensors have.

The tensors decide; what differs is named, since it means that the two files may not belong together
or that an expert lacks a part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from molora.io.peft_config import AdapterConfig, Names
from molora.io.peft_keys import examples
from molora.io.peft_patterns import first_matches

LAYER = re.compile(r"[^.]+\.(?:[^.]+\.)*?[^.]+\.(\d{1,9})\.")
"""A layer's number: the first segment of digits after two others or more, and before another."""


def target_differences(config: AdapterConfig, modules: Sequence[str], *, where: str) -> list[str]:
    """One line for each way in which the modules with tensors are not those of the configuration.

    Raises:
        ConfigError: a regex that cannot be matched.
    """
    differences = []
    if not _is_all_linear(config.target_modules) and config.target_modules is not None:
        named = _named(config.target_modules, modules, f"{where}: target_modules")
        surplus = [module for module in modules if module not in named]
        if surplus:
            differences.append(f"target_modules do not name adapted {examples(surplus)}")
        differences += _without_tensors(config.target_modules, modules)
    if config.exclude_modules:
        named = _named(config.exclude_modules, modules, f"{where}: exclude_modules")
        if named:
            differences.append(f"exclude_modules name adapted {examples(sorted(named))}")
    return differences + _layer_differences(config, modules)


def _is_all_linear(names: Names) -> bool:
    return isinstance(names, str) and names.lower() == "all-linear"


def _named(names: str | list[str], modules: Sequence[str], where: str) -> set[str]:
    if isinstance(names, str):
        found = first_matches([names], modules, whole=True, where=where)
        return {module for module, match in zip(modules, found, strict=True) if match is not None}
    wanted = set(names)
    return {module for module in modules if not wanted.isdisjoint(_ends(module))}


def _ends(module: str) -> list[str]:
    """The name and what follows each of its dots."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _without_tensors(names: str | list[str], modules: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        return []
    ends = {end for module in modules for end in _ends(module)}
    lacking = [name for name in names if name not in ends]
    return [f"no tensors for target_modules {examples(lacking)}"] if lacking else []


def _layer_differences(config: AdapterConfig, modules: Sequence[str]) -> list[str]:
    """A module that the list names whole is adapted in any layer. With a regex for the modules or
    in `layers_pattern`, this is left out."""
    wanted, targets = config.layers_to_transform, config.target_modules
    if wanted is None or wanted == [] or config.layers_pattern or isinstance(targets, str):
        return []
    whole = {*(targets or ())}
    modules = [module for module in modules if module not in whole]
    layers = {wanted} if isinstance(wanted, int) else set(wanted)
    found = {module: LAYER.match(module) for module in modules}
    present = {int(match[1]) for match in found.values() if match}
    surplus = [m for m, match in found.items() if match is None or int(match[1]) not in layers]
    differences = []
    if surplus:
        differences.append(f"layers_to_transform do not include adapted {examples(surplus)}")
    if layers - present:
        lacking = examples(str(layer)[:20] for layer in sorted(layers - present))
        differences.append(f"no tensors for layers_to_transform {lacking}")
    return differences

"""Adapters of a base's own experts one by one, modules in transformers 4, on a base that has their
weights stacked."""

from __future__ import annotations

from types import MappingProxyType

from torch import nn

from molora.attach.stacked import stack_sizes
from molora.compose.experts import FrozenExperts
from molora.errors import AttachError
from molora.io.adapter import Adapter
from molora.io.peft_fused import ONE, fused_experts


def for_stacks(model: nn.Module, experts: FrozenExperts) -> FrozenExperts:
    """Experts with factors of the base's single experts moved to the stacked weights that are in
    their place, the same function.

    Where the model has such modules, or no stacks, or no expert adapts them, they stay as they are.

    Raises:
        ConfigError: DoRA or biases, which stacked weights cannot have.
        CheckpointError: factors that do not fit each other, or of more experts than there are.
        AttachError: a model with stacks of several sizes.
    """
    sizes = stack_sizes(model)
    modules = {path for path, _ in model.named_modules()}
    odd = [name for name, a in experts.adapters.items() if sizes and _of_single(a, modules)]
    if not odd:
        return experts
    if len(sizes) > 1:
        raise AttachError(
            f"{odd[0]} adapts single experts of the base, which has stacks of {sorted(sizes)} "
            "weights here, so that it is not known how many there are of each. Load the adapter "
            "with package peft and save it again, or leave it out."
        )
    (size,) = sizes
    adapters = {
        name: fused_experts(adapter, num_experts=size) if name in odd else adapter
        for name, adapter in experts.adapters.items()
    }
    notes = [f"{name}: {adapters[name].notes[-1]}" for name in odd]
    return FrozenExperts(MappingProxyType(adapters), (*experts.notes, *notes))


def _of_single(adapter: Adapter, modules: set[str]) -> bool:
    return any(ONE.fullmatch(path) and path not in modules for path in adapter.modules)

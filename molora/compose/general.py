"""GenKnowSub (arXiv 2505.10939): experts without what general adapters know, in the exact form.

ΔW_e − mean_g ΔW_g, by concatenation of ranks. Package peft 0.21.2 subtracts the mean of A from A
and that of B from B instead, which is another update, and changes the adapters in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from molora.compose.experts import FrozenExperts
from molora.compose.merging.factors import computing_type, concatenated, update_norm
from molora.compose.merging.kinds import check_fixed_update
from molora.errors import CheckpointError, ConfigError
from molora.io.peft_adapter import Adapter, AdapterModule


def subtract_general(experts: FrozenExperts, general: FrozenExperts) -> FrozenExperts:
    """New experts ΔW_e − mean_g ΔW_g; neither of the two sets is changed.

    An expert's rank at a module is then its own and those of all general adapters together, its
    scaling 1. An adapter that lacks a module counts as zero there, so that an expert gets a module
    where only general adapters have one. Tensors are of the widest type, float32 at least. The hash
    is of the hashes of those that went in.

    Args:
        experts: to subtract from.
        general: adapters of general knowledge, e.g. of Wikipedia in several languages.

    Raises:
        ConfigError: an adapter with DoRA or an activated one.
        CheckpointError: modules whose sizes differ.
    """
    for name, adapter in [*experts.adapters.items(), *general.adapters.items()]:
        check_fixed_update(name, adapter)
    if not general.adapters:
        raise ConfigError("No general adapters are given; there is nothing to subtract.")
    adapters = {
        name: _without(name, adapter, general) for name, adapter in experts.adapters.items()
    }
    note = f"general knowledge of {', '.join(general.names)[:200]} was subtracted from all experts"
    return FrozenExperts(MappingProxyType(adapters), (*experts.notes, note))


def _without(name: str, adapter: Adapter, general: FrozenExperts) -> Adapter:
    share = 1 / len(general.adapters)
    modules = {}
    for path in dict.fromkeys([*adapter.modules, *general.modules]):
        terms = [(one.modules[path], -share) for one in general.adapters.values()
                 if path in one.modules]  # fmt: skip
        if path in adapter.modules:
            terms.insert(0, (adapter.modules[path], 1.0))
        modules[path] = _sum_of(terms, f"{path} of {name} and the general adapters")
    hashes = [adapter.sha256, *(one.sha256 for one in general.adapters.values())]
    return replace(
        adapter,
        modules=MappingProxyType(modules),
        sha256=hashlib.sha256(" ".join(hashes).encode()).hexdigest(),
        notes=(*adapter.notes, f"general knowledge of {len(general.adapters)} was subtracted"),
    )


def _sum_of(terms: Sequence[tuple[AdapterModule, float]], where: str) -> AdapterModule:
    sizes = {(module.lora_A.shape[1], module.lora_B.shape[0]) for module, _ in terms}
    if len(sizes) > 1:
        shown = ", ".join(f"{d} to {f}" for d, f in sorted(sizes))
        raise CheckpointError(
            f"{where} differ in size: {shown} features. They were trained on different bases."
        )
    dtype = computing_type([module for module, _ in terms])
    lora_A, lora_B = concatenated(
        [module.lora_A.to(dtype) for module, _ in terms],
        [module.lora_B.to(dtype) for module, _ in terms],
        [module.scaling * weight for module, weight in terms],
    )
    bias: Tensor | None = None
    for module, weight in terms:
        if module.bias is not None:
            part = module.bias.to(dtype) * (module.scaling * weight)
            bias = part if bias is None else bias + part
    return AdapterModule(lora_A, lora_B, 1.0, update_norm(lora_A, lora_B), bias)

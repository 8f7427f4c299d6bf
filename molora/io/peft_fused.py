"""Factors of each expert of a base, as transformers 4 has its modules → of the stacked parameters
that transformers 5 has in their place.

`experts.N.w1` and `w3` (Mixtral), or `gate_proj` and `up_proj`, are halves of
`experts.gate_up_proj`; `w2`, or `down_proj`, is `experts.down_proj`; the router `gate` is a
parameter `gate.weight`, and Mixtral's `block_sparse_moe` is `mlp`. The same function exactly:
factors of two halves are stacked for A and block-diagonal for B (peft 0.21.2,
`transformers_weight_conversion`). Other than there a half or an expert may lack factors, and
experts may differ in rank and scaling.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from molora.errors import CheckpointError, ConfigError
from molora.io.adapter import Adapter, AdapterModule, ExpertParameter

ONE = re.compile(
    r"(?P<block>.+)\.experts\.(?P<index>\d{1,4})\."
    r"(?:(?P<gate>w1|gate_proj)|(?P<up>w3|up_proj)|(?P<down>w2|down_proj))"
)
ROUTER = re.compile(r"(?P<block>.+\.(?:block_sparse_moe|mlp))\.gate")
Parts = dict[str, dict[int, AdapterModule]]


def fused_experts(adapter: Adapter, *, num_experts: int) -> Adapter:
    """The adapter with factors of single experts moved from `modules` to `parameters`, copied.

    Args:
        adapter: with modules such as `….experts.3.w1`; without any it is returned as it is.
        num_experts: of the base in each layer.

    Raises:
        ConfigError: DoRA or biases, which parameters cannot have.
        CheckpointError: factors of other sizes in one parameter, or of more experts than there are.
    """
    blocks: dict[str, Parts] = {}
    routers: dict[str, AdapterModule] = {}
    rest: dict[str, AdapterModule] = {}
    for path, module in adapter.modules.items():
        one, router = ONE.fullmatch(path), ROUTER.fullmatch(path)
        if one:
            part = next(name for name in ("gate", "up", "down") if one[name])
            parts = blocks.setdefault(_renamed(one["block"]), {})
            parts.setdefault(part, {})[int(one["index"])] = module
        elif router:
            routers[f"{_renamed(router['block'])}.gate.weight"] = module
        else:
            rest[path] = module
        if (one or router) and (module.bias is not None or module.magnitude is not None):
            raise ConfigError(
                f"{adapter.source}: {path} has a bias or is a DoRA, which the stacked parameter in "
                "its place cannot have. Train an adapter without."
            )
    if not blocks and not routers:
        return adapter
    parameters = dict(adapter.parameters)
    for block, parts in blocks.items():
        found = 1 + max(index for by_index in parts.values() for index in by_index)
        if found > num_experts:
            raise CheckpointError(
                f"{adapter.source} has factors of expert {found - 1} of {block}, and the base has "
                f"{num_experts}. Give the base it was trained on."
            )
        parameters |= _stacked(f"{adapter.source}: {block}", block, parts, num_experts)
    parameters |= {name: _alone(module) for name, module in routers.items()}
    return replace(
        adapter,
        modules=MappingProxyType(rest),
        parameters=MappingProxyType(parameters),
        notes=(*adapter.notes, "factors of single experts were stacked as transformers 5 has them"),
    )


def _renamed(block: str) -> str:
    return re.sub(r"\.block_sparse_moe$", ".mlp", block)


def _alone(module: AdapterModule) -> ExpertParameter:
    return ExpertParameter(
        module.lora_A[None], module.lora_B[None], module.scaling, module.update_norm
    )


def _stacked(where: str, block: str, parts: Parts, num_experts: int) -> dict[str, ExpertParameter]:
    stacked = {}
    if "gate" in parts or "up" in parts:
        halves = [parts.get("gate", {}), parts.get("up", {})]
        stacked[f"{block}.experts.gate_up_proj"] = _block_diagonal(where, halves, num_experts)
    if "down" in parts:
        name = f"{block}.experts.down_proj"
        stacked[name] = _block_diagonal(where, [parts["down"]], num_experts)
    return stacked


def _block_diagonal(
    where: str, halves: list[dict[int, AdapterModule]], num_experts: int
) -> ExpertParameter:
    """Halves of the output in order, each by the expert's number; what is lacking is zero."""
    every = [module for half in halves for module in half.values()]
    sizes = {(module.lora_A.shape[1], module.lora_B.shape[0]) for module in every}
    if len(sizes) > 1:
        raise CheckpointError(f"{where} has experts of other sizes: {sorted(sizes)}.")
    ((size_in, size_out),) = sizes
    ranks = [max((module.rank for module in half.values()), default=0) for half in halves]
    scalings = {module.scaling for module in every}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    dtype = every[0].lora_A.dtype
    for module in every:
        for factor in (module.lora_A, module.lora_B):
            dtype = torch.promote_types(dtype, factor.dtype)
    lora_A = torch.zeros(num_experts, sum(ranks), size_in, dtype=dtype)
    lora_B = torch.zeros(num_experts, size_out * len(halves), sum(ranks), dtype=dtype)
    for number, half in enumerate(halves):
        rows = slice(size_out * number, size_out * (number + 1))
        for expert, module in half.items():
            at = sum(ranks[:number])
            own = slice(at, at + module.rank)
            lora_A[expert, own] = module.lora_A
            lora_B[expert, rows, own] = _scaled(module, scaling).to(dtype)
    norm = math.hypot(*(module.update_norm for module in every))
    return ExpertParameter(lora_A, lora_B, scaling, norm)


def _scaled(module: AdapterModule, scaling: float) -> Tensor:
    """B with what of the module's scaling is not in the common one."""
    if module.scaling == scaling:
        return module.lora_B
    return module.lora_B.float() * (module.scaling / scaling)

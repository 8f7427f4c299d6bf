"""Speed against what the hardware can do, memory, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from molora.attach import Mixture

# Dense bf16 peak in FLOP/s by a part of torch.cuda.get_device_name(), the first that fits. Source:
# the makers' data sheets; where these print the figure with sparsity, half of it.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device, None if not known."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAK_FLOPS.items():
        wanted = name.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return peak
    return None


def device_peak_flops() -> float | None:
    """`peak_flops` of the GPU of this process; None without one."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


class TokenFlops:
    """FLOPs that a training step needs per token, without what is computed a second time.

    A matrix of N weights takes 2N in the forward pass, 2N in the backward pass for the gradient of
    its input, and 2N more for its own gradient if it is trained: 4N for the frozen base, 6N for
    trained experts, of which a token uses only those that act. Attention scores, norms and the
    gradient that nothing below the first adapted layer needs are left out; the recomputation of
    activation checkpointing is no useful work. Source: the count of 6N per token of Kaplan et al.
    (2001.08361), split into its three products.

    Attributes:
        base: of the linears of the base model, head included, per token.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        linears = [
            (in_features * out_features, module)
            for module in mixture.model.modules()
            if (in_features := _size(module, "in_features", "nx"))
            and (out_features := _size(module, "out_features", "nf"))
        ]
        self.base = sum(
            (6 if getattr(module.weight, "requires_grad", False) else 4) * weights
            for weights, module in linears
        )

    @property
    def known(self) -> bool:
        """False where tokens do not all pass the same linears once: encoder-decoders, and bases
        that are mixtures of experts themselves."""
        config: Any = self._mixture.model.config
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        mixture_of_experts = any(getattr(config, name, None) for name in names)
        return not (mixture_of_experts or getattr(config, "is_encoder_decoder", False))

    def per_token(self, acting: Mapping[str, float]) -> float:
        """The whole, where `acting` says for each site which share of its experts a row uses."""
        built, total = self._mixture.built, float(self.base)
        for path, bank in built.banks.items():
            share = acting.get(built.routed_by.get(path, ""), 1.0)
            total += share * sum(_flops(parameter) for parameter in bank.parameters())
        routers = (p for router in built.routers.values() for p in router.parameters())
        return total + sum(map(_flops, routers))


def _flops(parameter: torch.nn.Parameter) -> int:
    # ZeRO-3 keeps no elements in the parameter itself
    weights: int = getattr(parameter, "ds_numel", parameter.numel())
    return (6 if parameter.requires_grad else 4) * weights


def _size(module: torch.nn.Module, *names: str) -> int:
    found = [value for name in names if isinstance(value := getattr(module, name, None), int)]
    return found[0] if found else 0


def memory_mib() -> float:
    """Most GPU memory allocated so far, or without a GPU the memory that the process holds now."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(psutil.Process().memory_info().rss / 2**20, 1)


class Remaining:
    """Time left, from the steps made since this process began; evaluations count."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        """The loop begins, at a later step if the run was resumed."""
        self._first, self._started = step, time.perf_counter()

    def seconds(self, step: int, total: int) -> float:
        """Until step `total`, at `step`."""
        made = max(step - self._first, 1)
        return (time.perf_counter() - self._started) / made * max(total - step, 0)


def duration(seconds: float) -> str:
    """ "45 s", "12 min" or "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

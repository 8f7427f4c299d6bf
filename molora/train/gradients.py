"""Norms of the gradients of one optimiser step, by role and by site, under any engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora.attach import Mixture
from molora.routing.statistics import accumulator

NAMES = {"experts": "expert_grad_norm", "router": "router_grad_norm", "other": "other_grad_norm"}
"""Role → its name in a line of metrics."""


@dataclass(frozen=True)
class Norms:
    """Global norms of one optimiser step, before clipping."""

    roles: dict[str, float]
    """Role → norm."""
    sites: dict[str, dict[str, float]]
    """Site → role → norm."""


class GradientNorms:
    """Sums of squares, one per parameter, measured between the backward pass and the step.

    Without an engine and under DDP every rank holds the whole, averaged gradient then. Under ZeRO
    it holds the averaged gradient of its own share, and squares of shares are added up. Nothing is
    exchanged before a line of metrics is due. Hooks on the parameters would see the gradients of
    one rank, before they are averaged.

    Attributes:
        squares: (P,) of the parameters in the order of `Mixture.named_parameters`, on the device;
            None before the first step.
        step: whose gradients these are.
        shared: whether ranks hold shares.
    """

    def __init__(self, mixture: Mixture) -> None:
        built = mixture.built
        self._parameters = dict(mixture.named_parameters())
        self._groups: list[tuple[str, str | None]] = []
        owners = {
            f"{path}.experts.": ("experts", built.routed_by.get(path)) for path in built.banks
        }
        # one that decides for many sites belongs to none of them
        owners |= {
            f"{path}.": ("router", site if site in built.sites else None)
            for path in built.routers
            for site in [path.removesuffix("router").removesuffix(".") or "model"]
        }
        for name in self._parameters:
            found = [owners[p] for p in _prefixes(name) if p in owners]
            self._groups.append(found[-1] if found else ("other", None))
        self.squares: Tensor | None = None
        self.step = -1
        self.shared = False

    @torch.no_grad()
    def measure(self, *, step: int, device: torch.device) -> None:
        """Look at the gradients of the step that is about to be made, without synchronisation."""
        parameters = self._parameters.values()
        self.shared = any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters)
        gradients = [own_gradient(parameter) for parameter in parameters]
        held = [gradient for gradient in gradients if gradient is not None]
        norms = iter(torch._foreach_norm(held, dtype=torch.float32) if held else ())
        none = torch.zeros((), device=device)
        squares = [none if g is None else next(norms).to(device) for g in gradients]
        self.squares = torch.stack(squares).to(accumulator(device)).square()
        self.step = step

    def norms(self, squares: Sequence[float], *, total: float | None) -> Norms:
        """Norms from squares that were added over the shares.

        Args:
            squares: one per parameter.
            total: norm of the whole gradient before clipping, as the Trainer logs it. After
                clipping, or before a loss scale is taken out, all squares are off by one factor.
        """
        found = math.sqrt(sum(squares))
        factor = total / found if total is not None and found > 0 else 1.0
        roles: dict[str, float] = {}
        sites: dict[str, dict[str, float]] = {}
        for (role, site), square in zip(self._groups, squares, strict=True):
            roles[role] = roles.get(role, 0.0) + square
            if site is not None:
                of_site = sites.setdefault(site, {})
                of_site[role] = of_site.get(role, 0.0) + square
        return Norms(
            {role: factor * math.sqrt(square) for role, square in roles.items()},
            {
                site: {role: factor * math.sqrt(square) for role, square in of_site.items()}
                for site, of_site in sites.items()
            },
        )


def own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The averaged gradient, or under ZeRO this rank's share of it; None if there is none.

    No communication. Between the backward pass and the step only.
    """
    if parameter.grad is not None:
        return parameter.grad
    if not parameter.requires_grad:
        return None
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        from deepspeed.utils import safe_get_local_grad

        gradient: Tensor | None = safe_get_local_grad(parameter)
        return gradient
    held: Any = parameter
    mapping = getattr(held, "_hp_mapping", None)
    if mapping is None:  # another rank's, under ZeRO-1 and 2
        return None
    share: Tensor = mapping.get_lp_grad_fragment(held._index_in_param_group)
    place = mapping.lp_fragment_address
    if share.numel() != place.numel:
        share = share.flatten().narrow(0, place.start, place.numel)
    return share


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) + "." for i in range(len(parts))]

"""Routers over experts that were trained before: nothing in them is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from molora.dtypes import apply_keeping_dtype
from molora.kernels.grouped_product import grouped_product
from molora.kernels.plan import plan_rows
from molora.routing.router import wide

SORTING_PAYS = 12
"""Times as many experts as are compared, from which on sorting rows costs less than products with
all of them (one CPU thread, float32, D 512, R 8, 20 compared: equal at 256 experts)."""


class UpdateNormRouter(nn.Module):
    """logits = ‖factor_e x‖ / temperature, in float32, where ‖factor_e x‖ = ‖ΔW_e x‖.

    Source: SpectR (2504.03454); with `preselect` LAG (2507.05346), which compares only the experts
    of a row with the largest |W x|. The logits of the others are −∞.

    Args:
        factor: (E, R, in), S Vᵀ of the SVD of ΔW_e, or as much of any rank R; rows of 0 pad.
        weight: (E, in) first right-singular vectors, where `preselect` is given.
        temperature: divides the logits.
        preselect: experts of a row that are compared; None: all.
    """

    trainable = False

    def __init__(
        self,
        factor: Tensor,
        weight: Tensor | None = None,
        *,
        temperature: float = 1.0,
        preselect: int | None = None,
    ) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor, requires_grad=False)
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        self.num_experts, self.rank, self.in_features = factor.shape
        self.temperature = temperature
        self.preselect = preselect

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, in) of any float dtype → (T, E) float32."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = wide(x_TD)
            if self.weight is None or self.preselect is None:
                return self._norms(x_TD) / self.temperature
            near_TE = (x_TD @ self.weight.to(x_TD.dtype).T).abs()
            present_E = getattr(self, "present", None)
            if present_E is not None:  # ties, as for an input of 0, must not leave a row nobody
                near_TE = near_TE.masked_fill(~present_E, -1.0)
            index_TK = near_TE.topk(min(self.preselect, self.num_experts), dim=-1).indices
            norms_TK = self._norms_of(x_TD, index_TK) / self.temperature
            return torch.full_like(near_TE, -torch.inf).scatter(1, index_TK, norms_TK)

    def _norms(self, x_TD: Tensor) -> Tensor:
        """(T, E): the norms for all experts."""
        z_TP = x_TD @ self.factor.to(x_TD.dtype).flatten(0, 1).T
        return z_TP.unflatten(1, (-1, self.rank)).norm(dim=-1)

    def _norms_of(self, x_TD: Tensor, index_TK: Tensor) -> Tensor:
        """(T, K): the norms for the chosen experts alone, each over the rows that chose it."""
        few = self.num_experts <= SORTING_PAYS * index_TK.shape[1]
        if few or torch.compiler.is_compiling():  # torch compiles no grouped product of float32
            return self._norms(x_TD).gather(1, index_TK)
        plan = plan_rows(index_TK, self.num_experts, grouping="slot")
        factor_EDR = self.factor.to(x_TD.dtype).transpose(1, 2)
        z_NR = grouped_product(x_TD.index_select(0, plan.order_N), factor_EDR, plan.offsets_G)
        places_N = plan.order_N * index_TK.shape[1] + plan.slot_NS[:, 0]
        norms_N = z_NR.norm(dim=-1)
        return torch.zeros_like(norms_N).scatter(0, places_N, norms_N).view(index_TK.shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_experts={self.num_experts}, rank={self.rank}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> UpdateNormRouter:
        return apply_keeping_dtype(self, super()._apply, fn, recurse)


class FixedRouter(nn.Module):
    """The same logits for every row.

    Args:
        weight: (E,).
    """

    trainable = False
    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # the configuration holds it: it is not saved beside
        self.register_buffer("weight", weight, persistent=False)
        self.num_experts = len(weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, in) → (T, E) float32."""
        return self.weight.expand(len(x_TD), -1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FixedRouter:
        return apply_keeping_dtype(self, super()._apply, fn, recurse)

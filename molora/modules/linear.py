"""y = base(x) + Σ_k gate_k · scaling · B A x at one linear."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from molora.experts import ExpertBank
from molora.modules.context import ForwardContext
from molora.modules.site import RoutingSite, SharedDecision


class MoLoRALinear:
    """Takes over the forward of a linear, which stays in the model under its own name.

    The bank and, with scope "linear", the router are children of the base module, so its parameters
    keep their names and whoever reads `module.weight` or `module.in_features` still can. Quantised
    linears keep their own forward.

    Args:
        base_forward: the base module's forward before it was taken over, (..., in) → (..., out).
        experts: the bank.
        decision: what decides; None for a bank without a router, whose experts all act with gate 1.
        context: shared state of the model's forward.
    """

    def __init__(
        self,
        base_forward: Callable[[Tensor], Tensor],
        experts: ExpertBank,
        *,
        decision: RoutingSite | SharedDecision | None,
        context: ForwardContext,
    ) -> None:
        self.base_forward = base_forward
        self.experts = experts
        self.decision = decision
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out) in the base's output dtype; the base alone while disabled."""
        y = self.base_forward(x)
        if not self.context.enabled:
            return y
        routing = None if self.decision is None else self.decision.decide(x)
        delta_TF = self.experts(x.reshape(-1, x.shape[-1]), routing)
        return y + delta_TF.to(y.dtype).view(y.shape)

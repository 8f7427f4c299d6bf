"""y = base(x) + Σ_k gate_k · scaling · B A x at one linear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from molora.experts import ExpertBank
from molora.kernels import Base
from molora.modules.context import ForwardContext
from molora.modules.model_decision import ModelDecision
from molora.modules.product import SharedProduct
from molora.modules.site import RoutingSite, SharedDecision


class MoLoRALinear:
    """Takes over the forward of a linear, which stays in the model under its own name.

    The bank and, with scope "linear", the router are children of the base module, so its parameters
    keep their names and whoever reads `module.weight` or `module.in_features` still can. Linears
    that are more than a product with a weight (quantised, or wrapped by another library) keep their
    own forward, to which the update is added; a plain one's product is made by the kernel.

    Args:
        base: the linear.
        base_forward: its forward before it was taken over, (..., in) → (..., out).
        experts: the bank.
        decision: what decides; None for a bank without a router, whose experts all act with gate 1.
        context: shared state of the model's forward.
        plain: whether `base_forward` is x Wᵀ + b of a weight (out, in), "linear", or (in, out),
            "conv1d"; None if it is anything else.
    """

    def __init__(
        self,
        base: nn.Module,
        base_forward: Callable[[Tensor], Tensor],
        experts: ExpertBank,
        *,
        decision: RoutingSite | SharedDecision | ModelDecision | None,
        context: ForwardContext,
        plain: str | None = None,
    ) -> None:
        self.base = base
        self.base_forward = base_forward
        self.experts = experts
        self.decision = decision
        self.context = context
        self.plain = plain
        self.product = SharedProduct([self])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out) in the base's output dtype; the base alone while disabled."""
        if not self.context.enabled:
            return self.base_forward(x)
        made = self.product.of(self, x)
        routing = None if self.decision is None else self.decision.decide(x, logits_TE=made.logits)
        x_TD = x.reshape(-1, x.shape[-1])
        base = self._base(x)
        if base is not None:
            y_TF = self.experts(x_TD, routing, down_TP=made.down, base=base)
            return y_TF.view(*x.shape[:-1], -1)
        if not self.experts.reads_product:
            y_TF = self.experts(x_TD, routing, down_TP=made.down)
            y = self.base_forward(x)
            return y + y_TF.to(y.dtype).view(y.shape)
        y = self.base_forward(x)
        bias = getattr(self.base, "bias", None)
        product_TF = (y if bias is None else y - bias).reshape(-1, y.shape[-1])
        y_TF = self.experts(x_TD, routing, product_TF=product_TF)
        return y + y_TF.to(y.dtype).view(y.shape)

    def _base(self, x: Tensor) -> Base | None:
        """The base for a kernel; None where it must run by itself: the kernel has no gradient for
        its weight, and autocast is for modules."""
        if self.plain is None or torch.is_autocast_enabled(x.device.type):
            return None
        if self.experts.reads_product:
            return None
        weight, bias = self.base.weight, self.base.bias
        assert isinstance(weight, Tensor)
        trained = weight.requires_grad or (isinstance(bias, Tensor) and bias.requires_grad)
        if trained or weight.dtype != x.dtype:
            return None
        return Base(weight, bias, self.plain == "conv1d")  # type: ignore[arg-type]

    def router_weight(self) -> Tensor | None:
        """The weight whose product with this linear's input the logits are made of, if any."""
        if not isinstance(self.decision, RoutingSite):
            return None
        return self.decision.linear_weight()

    def down_factor(self, x: Tensor) -> Tensor | None:
        """The stacked A that is multiplied with this linear's input as it is, if any."""
        return self.experts.shared_factor(x, None if self.decision is None else self.decision.slots)

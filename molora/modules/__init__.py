"""Glue between a base module, its expert bank and a routing decision; never a config."""

from molora.modules.context import ForwardContext, SideInputs
from molora.modules.ffn import MoLoRAFeedForward, Projection
from molora.modules.linear import MoLoRALinear
from molora.modules.model_decision import ModelDecision
from molora.modules.product import SharedProduct
from molora.modules.site import RoutingSite, SharedDecision

__all__ = [
    "ForwardContext",
    "MoLoRAFeedForward",
    "MoLoRALinear",
    "ModelDecision",
    "Projection",
    "RoutingSite",
    "SharedDecision",
    "SharedProduct",
    "SideInputs",
]

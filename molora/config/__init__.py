"""Configuration as pure data: frozen pydantic models, unknown keys rejected, tagged unions."""

from molora.config.allocation import SHAPES, Allocation, PerLayer, Shape, Uniform, resolve
from molora.config.base import Frozen
from molora.config.experts import Dropout, ExpertForm, LoRA, SharedA
from molora.config.losses import (
    Importance,
    LoadBalance,
    LocalizedBalance,
    Loss,
    RouterZ,
    RoutingEntropy,
)
from molora.config.mixture import FFNSite, Group, LinearSite, MixtureConfig, TokenRows
from molora.config.routing import (
    Capacity,
    Dense,
    KaimingInit,
    LinearRouter,
    NormalInit,
    Sigmoid,
    Softmax,
    Threshold,
    TopK,
    TopP,
    UnitTop1,
)

__all__ = [
    "SHAPES",
    "Allocation",
    "Capacity",
    "Dense",
    "Dropout",
    "ExpertForm",
    "FFNSite",
    "Frozen",
    "Group",
    "Importance",
    "KaimingInit",
    "LinearRouter",
    "LinearSite",
    "LoRA",
    "LoadBalance",
    "LocalizedBalance",
    "Loss",
    "MixtureConfig",
    "NormalInit",
    "PerLayer",
    "RouterZ",
    "RoutingEntropy",
    "Shape",
    "SharedA",
    "Sigmoid",
    "Softmax",
    "Threshold",
    "TokenRows",
    "TopK",
    "TopP",
    "Uniform",
    "UnitTop1",
    "resolve",
]

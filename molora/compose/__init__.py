"""Sets of adapters that others trained, as frozen experts."""

from molora.compose.compose import compose
from molora.compose.edit import edited, experts_of, saved_experts
from molora.compose.experts import FrozenExperts, load_experts
from molora.compose.foreign import router_from
from molora.compose.general import subtract_general
from molora.compose.joint import compress
from molora.compose.merging import merge
from molora.compose.xlora import compose_xlora, export_xlora

__all__ = [
    "FrozenExperts",
    "compose",
    "compose_xlora",
    "compress",
    "edited",
    "experts_of",
    "export_xlora",
    "load_experts",
    "merge",
    "router_from",
    "saved_experts",
    "subtract_general",
]

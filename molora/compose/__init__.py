"""Sets of adapters that others trained, as frozen experts."""

from molora.compose.compose import compose
from molora.compose.experts import FrozenExperts, load_experts

__all__ = ["FrozenExperts", "compose", "load_experts"]

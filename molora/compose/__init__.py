"""Sets of adapters that others trained, as frozen experts."""

from molora.compose.experts import FrozenExperts, load_experts

__all__ = ["FrozenExperts", "load_experts"]

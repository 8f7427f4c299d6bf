"""Who computes: routers, scores, selectors, and the record of their decision."""

from molora.routing.record import Routing, concatenate
from molora.routing.router import LinearRouter

__all__ = ["LinearRouter", "Routing", "concatenate"]

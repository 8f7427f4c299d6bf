"""Auxiliary losses: pure functions of routing records, and their weighted sum."""

from molora.losses.total import AuxLosses, WeightedTerm, total

__all__ = ["AuxLosses", "WeightedTerm", "total"]

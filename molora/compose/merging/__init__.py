"""Experts combined with fixed weights into one LoRA, from their factors alone."""

from molora.compose.merging.merge import METHODS, Merged, merge

__all__ = ["METHODS", "Merged", "merge"]

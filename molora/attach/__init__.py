"""Mixtures on Hugging Face models: the only package that knows their module names."""

from molora.attach.attach import attach
from molora.attach.checkpointing import checkpoint_context
from molora.attach.mixture import Mixture
from molora.attach.plan import Plan, make_plan
from molora.attach.saving import load

__all__ = ["Mixture", "Plan", "attach", "checkpoint_context", "load", "make_plan"]

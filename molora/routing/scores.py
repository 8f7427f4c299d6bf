"""Logits → scores: pure functions of (rows, E) float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ScoreFunction = Callable[[Tensor], Tensor]


def softmax(logits_TE: Tensor) -> Tensor:
    """Probabilities over the experts; each row sums to 1."""
    return torch.softmax(logits_TE, dim=-1)


def sigmoid(logits_TE: Tensor) -> Tensor:
    """One independent probability per expert."""
    return torch.sigmoid(logits_TE)


def identity(logits_TE: Tensor) -> Tensor:
    """The logits themselves, as fixed weights are."""
    return logits_TE

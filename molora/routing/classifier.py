"""X-LoRA's classifier: a small network from the final hidden state to logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from molora.dtypes import apply_keeping_dtype
from molora.routing.router import wide


class HiddenStateClassifier(nn.Module):
    """Linear, or Linear, ReLU, dropout and so on (X-LoRA, 2402.07148), in float32.

    Its parameters are called as in package peft: `layers.0.weight` …

    Args:
        in_features: of the hidden state.
        num_experts: E.
        num_groups: L; how many decisions it makes for a row.
        depth: linear layers.
        width: features between them.
        dropout: between them, in training.
        temperature: divides the logits.
        make: shape and name of a parameter → its starting values.
    """

    trainable = True

    def __init__(
        self,
        in_features: int,
        *,
        num_experts: int,
        num_groups: int,
        depth: int,
        width: int,
        dropout: float,
        temperature: float,
        make: Callable[[str, tuple[int, ...]], Tensor],
    ) -> None:
        super().__init__()
        sizes = [in_features, *[width] * (depth - 1), num_groups * num_experts]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            if layers:
                layers.append(nn.ReLU())
                layers += [nn.Dropout(dropout)] if dropout > 0 else []
            linear = nn.Linear(before, after, device="meta")
            linear.weight = nn.Parameter(make(f"layers.{len(layers)}.weight", (after, before)))
            linear.bias = nn.Parameter(make(f"layers.{len(layers)}.bias", (after,)))
            layers.append(linear)
        self.layers = nn.Sequential(*layers)
        self.num_experts = num_experts
        self.num_groups = num_groups
        self.temperature = temperature

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """(T, in) of any float dtype → (T, L, E) float32."""
        with torch.autocast(hidden_TH.device.type, enabled=False):
            first = self.layers[0]
            assert isinstance(first, nn.Linear)
            logits_TP = self.layers(wide(hidden_TH).to(first.weight.dtype)).float()
        return logits_TP.unflatten(1, (self.num_groups, self.num_experts)) / self.temperature

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HiddenStateClassifier:
        return apply_keeping_dtype(self, super()._apply, fn, recurse)


class Standing(nn.Module):
    """In the place of a router where the logits come from elsewhere; it only keeps `present`."""

    trainable = False

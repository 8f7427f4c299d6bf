"""The frozen linear under a mixture, where a kernel adds to its product instead of beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Base:
    """x Wᵀ + b of a frozen linear.

    Attributes:
        weight: (F, D); with `transposed` (D, F), as GPT-2's Conv1D keeps it. The parameter itself
            and no view of it: ZeRO-3 takes what is in a parameter away between forward and
            backward.
        bias: (F,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False

    def product(self, x_TD: Tensor) -> Tensor:
        """(T, D) → (T, F), as the linear itself computes it."""
        if not self.transposed:
            return torch.nn.functional.linear(x_TD, self.weight, self.bias)
        if self.bias is None:
            return x_TD @ self.weight
        return torch.addmm(self.bias, x_TD, self.weight)

    def input_gradient(self, grad_TF: Tensor) -> Tensor:
        """(T, F) → (T, D)."""
        return grad_TF @ (self.weight.T if self.transposed else self.weight)

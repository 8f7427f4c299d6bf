"""A router that reads what the experts would add, and not the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from molora.dtypes import apply_keeping_dtype

ReadOut = Callable[..., Tensor]
"""(x (T, in), None, readout_NEF=(N, E, out)) → (T, N + 1): Σ_e readout_ne · y_e for each n, and
Σ_e ‖y_e‖², with y_e the ungated update of expert e: a bank."""
SHORTEST = 1e-12
"""Updates of a row that are shorter together count as 0."""


class OutputsRouter(nn.Module):
    """logits = W n / τ, n = (y_1, …, y_E) / ‖(y_1, …, y_E)‖, the updates of all experts for a row.

    Source: MoLE (2404.13628). There the outputs of a whole sequence are one vector, so
    that every token depends on later ones; here each row has logits of its own. How the paper
    normalises is [unverified]; τ is learned as exp of a parameter that starts at 0, which keeps it
    positive.

    Args:
        weight: (E, E · out).
        log_temperature: (1,).
    """

    trainable = True

    def __init__(self, weight: Tensor, log_temperature: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.log_temperature = nn.Parameter(log_temperature)
        self.num_experts = weight.shape[0]
        self._read_out: tuple[ReadOut, ...] = ()

    def bind(self, read_out: ReadOut) -> None:
        """Say whose updates are read."""
        # in a tuple: the bank is a module, and a child of the linear already
        self._read_out = (read_out,)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, in) of any float dtype → (T, E) float32."""
        (read_out,) = self._read_out
        with torch.autocast(x_TD.device.type, enabled=False):
            readout_NEF = self.weight.view(self.num_experts, self.num_experts, -1)
            found_TM = read_out(x_TD, None, readout_NEF=readout_NEF)
            products_TN, squares_T = found_TM[:, :-1], found_TM[:, -1]
            # the smallest is squared first, so that the root of 0 has a slope
            length_T1 = squares_T.clamp_min(SHORTEST**2).sqrt()[:, None]
            return products_TN / length_T1 * torch.exp(-self.log_temperature.to(products_TN.dtype))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OutputsRouter:
        return apply_keeping_dtype(self, super()._apply, fn, recurse)

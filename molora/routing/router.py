"""The learnable part of routing: a linear map from a row to one logit per expert, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from molora.dtypes import apply_keeping_dtype


class LinearRouter(nn.Module):
    """logits = (W x + b) / temperature + noise, in float32 and with autocast off inside.

    Args:
        weight: (E, in); its dtype survives `.bfloat16()` and engine casts.
        bias: (E,), or None.
        temperature: divides the logits.
        noise_std: standard deviation of Gaussian noise on the logits, in training only.
        jitter: in training the input is multiplied by uniform(1 − jitter, 1 + jitter), for the
            router alone.
        reads: x as it is, with mean 0 and variance 1 ("layer_norm"), or with norm 1 ("unit").
        absolute: |W x| in place of W x, for directions without a sign.
        trainable: whether weight and bias get gradients.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        temperature: float = 1.0,
        noise_std: float = 0.0,
        jitter: float = 0.0,
        reads: Literal["as it is", "layer_norm", "unit"] = "as it is",
        absolute: bool = False,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=trainable)
        self.num_experts, self.in_features = weight.shape
        self.temperature = temperature
        self.noise_std = noise_std
        self.jitter = jitter
        self.reads = reads
        self.absolute = absolute
        self.trainable = trainable

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, in) of any float dtype → (T, E) float32."""
        if not torch.is_autocast_enabled(x_TD.device.type):
            return self._logits(x_TD)
        # float32: bf16 logits tie in top-k, and the expert then depends on the backend
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._logits(x_TD)

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self.training and self.jitter > 0:
            x_TD = x_TD.float() * torch.empty_like(x_TD, dtype=torch.float32).uniform_(
                1 - self.jitter, 1 + self.jitter
            )
        x_TD = self._read(x_TD)
        if not torch.is_grad_enabled():
            return self.finish(_float32_product(x_TD, self.weight))
        return self.finish(_Float32Linear.apply(x_TD, self.weight))

    def _read(self, x_TD: Tensor) -> Tensor:
        if self.reads == "layer_norm":
            return nn.functional.layer_norm(wide(x_TD), x_TD.shape[-1:])
        return nn.functional.normalize(wide(x_TD), dim=-1) if self.reads == "unit" else x_TD

    def is_product(self) -> bool:
        """Whether a call is `finish(x Wᵀ)` of the input as it is, which nobody else waits for."""
        changed = (self.training and self.jitter > 0) or self.reads != "as it is"
        return not (changed or self._forward_hooks or self._forward_pre_hooks)

    def finish(self, logits_TE: Tensor) -> Tensor:
        """x Wᵀ, (T, E) float32 → logits."""
        if self.bias is not None:
            logits_TE = logits_TE + self.bias.to(logits_TE.dtype)
        if self.absolute:
            logits_TE = logits_TE.abs()
        if self.temperature != 1.0:
            logits_TE = logits_TE / self.temperature
        if self.training and self.noise_std > 0:
            logits_TE = logits_TE + self.noise_std * torch.randn_like(logits_TE)
        return logits_TE

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_experts={self.num_experts}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LinearRouter:
        return apply_keeping_dtype(self, super()._apply, fn, recurse)


class _Float32Linear(torch.autograd.Function):
    """x Wᵀ in at least float32, saving x in its own dtype.

    A float32 copy would double its memory in bf16.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return _float32_product(x_TD, weight_ED)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_x = (
            (grad_TE @ weight_ED.to(grad_TE.dtype)).to(x_TD.dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        grad_w = (
            (grad_TE.T @ x_TD.to(grad_TE.dtype)).to(weight_ED.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        return grad_x, grad_w


def _float32_product(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    x_TD = wide(x_TD)
    return x_TD @ weight_ED.to(x_TD.dtype).T


def wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x if x.dtype == torch.float64 else x.float()

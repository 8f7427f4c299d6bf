"""One product for all down-projections and routers that read the same tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from molora.experts.bank import ExpertBank, compute_dtype
from molora.kernels.lora_mix import dense

if TYPE_CHECKING:
    from molora.modules.linear import MoLoRALinear


@dataclass(frozen=True)
class Product:
    """What a linear has of it.

    Attributes:
        down: (T, E·R), A x in the compute dtype; None if the bank makes it.
        logits: (T, E) float32, the router's product; None if the router makes it.
    """

    down: Tensor | None = None
    logits: Tensor | None = None


class SharedProduct:
    """Made by the first linear of a block that is called, for all that may read the same tensor.

    A sibling that turns out to read another one makes its own. It lives for one call of the block.

    Args:
        members: the linears.
    """

    def __init__(self, members: Sequence[MoLoRALinear]) -> None:
        self.members = list(members)
        self._x: Tensor | None = None
        self._made: dict[int, Product] = {}

    def of(self, member: MoLoRALinear, x: Tensor) -> Product:
        """The part of one linear, called with x of shape (..., in)."""
        if not torch.is_grad_enabled():
            # nothing is kept, and for few rows it would cost more to put the factors together
            return Product()
        if len(self.members) == 1 or torch.compiler.is_compiling():
            # a compiled, checkpointed block may change nothing outside of itself
            return _products(x, [member])[0]
        number = self.members.index(member)
        if self._x is x and number in self._made:
            product = self._made.pop(number)
            if not self._made:
                self._x = None
            return product
        if is_partitioned(member.experts):
            # ZeRO-3 gives every module an input of its own, and has only the parameters of modules
            # that run
            return _products(x, [member])[0]
        products = _products(x, self.members)
        self._x, self._made = x, {n: p for n, p in enumerate(products) if n != number}
        return products[number]

    def forget(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the block, also called when it raised."""
        self._x, self._made = None, {}


def is_partitioned(bank: ExpertBank) -> bool:
    """Whether DeepSpeed's ZeRO-3 divides its parameters among processes."""
    # `get`, since ZeRO-3 gathers a parameter that is looked up by attribute or index
    return hasattr(bank._parameters.get("lora_A"), "ds_id")


def _products(x: Tensor, members: Sequence[MoLoRALinear]) -> list[Product]:
    factors = [None if is_partitioned(m.experts) else m.down_factor(x) for m in members]
    routers = [None if is_partitioned(m.experts) else m.router_weight() for m in members]
    present = [f for f in factors if f is not None], [r for r in routers if r is not None]
    if not any(present):
        return [Product()] * len(members)
    x_TD = x.reshape(-1, x.shape[-1])
    downs, logits = map(iter, dense.down(x_TD, *present, dtype=compute_dtype(x)))
    return [
        Product(None if f is None else next(downs), None if r is None else next(logits))
        for f, r in zip(factors, routers, strict=True)
    ]

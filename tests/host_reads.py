"""Counts how often a program waits for its device, also where the device is the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# calls that bring values of a tensor to Python, or whose result's shape depends on values
_READS = [
    *("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"),
    *("nonzero", "masked_select", "unique", "equal", "is_nonzero", "__contains__", "__repr__"),
]
READS = {getattr(Tensor, name) for name in _READS} | {
    *(torch.nonzero, torch.masked_select, torch.unique, torch.equal, torch.is_nonzero),
    *(torch.allclose, torch.bincount),
}


class Host(Tensor):
    """A tensor that has been copied to the host, and what is computed from it."""


class HostReads(TorchFunctionMode):
    """Inside, copies to the host (`.cpu()`) and reads of what was not copied are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0
        self.reads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            self.copies += 1
            return func(*args, **(kwargs or {})).as_subclass(Host)
        by_mask = func in (Tensor.__getitem__, Tensor.__setitem__) and _has_mask(args[1])
        # a torch.device is the device of the computation, which may well be the CPU here
        to_host = func is Tensor.to and "cpu" in [a for a in args[1:] if isinstance(a, str)]
        if (func in READS or by_mask or to_host) and not isinstance(args[0], Host):
            self.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return counted


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)

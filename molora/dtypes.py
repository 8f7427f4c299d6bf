"""Parameters that keep their dtype: a float32 router must survive `model.bfloat16()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def apply_keeping_dtype(
    module: M, parent_apply: Callable[..., Any], fn: Callable[..., Any], recurse: bool
) -> M:
    """`module._apply(fn)` for moves between devices, without changes of floating dtype.

    The value is taken from the source tensor, not cast forth and back, so no precision is lost.
    """

    def move_only(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if tensor.is_floating_point() and moved.dtype != tensor.dtype:
            return tensor.to(moved.device)
        return moved

    parent_apply(move_only, recurse)
    return module

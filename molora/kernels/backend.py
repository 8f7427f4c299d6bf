"""The table of kernel backends: a name chosen once, at attach, for every op of a mixture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from molora.errors import BackendError
from molora.kernels import lora_mix, lora_rows
from molora.kernels.cost import Chooser
from molora.kernels.lora_mix import triton_mix
from molora.kernels.lora_rows import triton_rows
from molora.kernels.plan import plan_rows
from molora.kernels.triton_rows import SharedRows

_counters: list[Counter[tuple[str, str]]] = []


@dataclass(frozen=True)
class Backend:
    """One implementation of each op; the signatures are those of `kernels/*/reference.py`."""

    name: str
    lora_mix: Callable[..., Tensor]
    lora_rows: Callable[..., Tensor]
    lora_down: Callable[..., tuple[list[Tensor], list[Tensor]]] | None = None
    lora_up: Callable[..., Tensor] | None = None
    """The halves of lora_mix, where it has two that may be called apart; their signatures are those
    of `lora_mix/dense.py`."""
    plan: Callable[[Tensor, int], Any] | None = None
    """(T, K) expert indices and E → what the ops take as `plan`, if they sort rows."""


Kernels = Backend | Chooser
"""What a mixture computes with: one backend, or the choice among them."""


def counted(op: str, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, whose calls `count_calls` sees."""

    def call(*args: object, **kwargs: object) -> Tensor:
        # a compiled call is counted nowhere: graphs would depend on who counts
        for counter in () if torch.compiler.is_compiling() else _counters:
            counter[op, name] += 1
        return function(*args, **kwargs)

    return call


@contextmanager
def count_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Count the kernels that run inside, by (op, backend)."""
    counter: Counter[tuple[str, str]] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


def _made(name: str, mix: Callable[..., Tensor], rows: Callable[..., Tensor]) -> Backend:
    return Backend(name, counted("lora_mix", name, mix), counted("lora_rows", name, rows))


BACKENDS: dict[str, Backend] = {
    "reference": _made("reference", lora_mix.reference.lora_mix, lora_rows.reference.lora_rows),
    "dense": replace(
        _made("dense", lora_mix.dense.lora_mix, lora_rows.dense.lora_rows),
        lora_down=lora_mix.dense.down,
        lora_up=counted("lora_mix", "dense", lora_mix.dense.up),
    ),
    "grouped": replace(
        _made("grouped", lora_mix.grouped.lora_mix, lora_rows.grouped.lora_rows), plan=plan_rows
    ),
    "gather": _made("gather", lora_mix.gather.lora_mix, lora_rows.gather.lora_rows),
    "triton": replace(_made("triton", triton_mix.lora_mix, triton_rows.lora_rows), plan=SharedRows),
}


def backend(name: str) -> Kernels:
    """The backend called `name`; "auto" chooses one for the shape of each call.

    Raises:
        BackendError: no such backend.
        ConfigError: "auto", and the user's calibration is damaged.
    """
    if name == "auto":
        return Chooser(BACKENDS)
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r} does not exist. Known: auto, {', '.join(BACKENDS)}.")
    return BACKENDS[name]

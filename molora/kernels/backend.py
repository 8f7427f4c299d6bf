"""The table of kernel backends: a name chosen once, at attach, for every op of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from molora.errors import BackendError
from molora.kernels import lora_mix, lora_rows


@dataclass(frozen=True)
class Backend:
    """One implementation of each op; the signatures are those of `kernels/*/reference.py`."""

    name: str
    lora_mix: Callable[..., Tensor]
    lora_rows: Callable[..., Tensor]


BACKENDS: dict[str, Backend] = {
    "reference": Backend("reference", lora_mix.reference.lora_mix, lora_rows.reference.lora_rows),
    "dense": Backend("dense", lora_mix.dense.lora_mix, lora_rows.dense.lora_rows),
}


def backend(name: str) -> Backend:
    """The backend called `name`; "auto" is `dense`, whose cost does not depend on the routing.

    Raises:
        BackendError: no such backend.
    """
    name = "dense" if name == "auto" else name
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r} does not exist. Known: auto, {', '.join(BACKENDS)}.")
    return BACKENDS[name]

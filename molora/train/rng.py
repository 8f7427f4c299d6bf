"""Positions of the random streams as tensors of fixed size, and back: each stream continues.

Every rank has its own; since their shapes are the same everywhere, ranks may gather them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molora.errors import CheckpointError

WORDS = 624
"""32-bit words of the Mersenne twister, which python and numpy share; a position follows them."""


def rng_state(devices: Sequence[torch.device | int] = ()) -> dict[str, Tensor]:
    """Positions of python's, numpy's global and torch's streams, and of those CUDA `devices`.

    The devices are those of this process's model, in an order that a resumed run repeats.

    Returns:
        `python`, `numpy` (625,) int64: the words, and how many were used; `python_normal`,
        `numpy_normal` (1,) float64: the second of a pair of normal numbers, NaN if it was used;
        `torch` (5056,) uint8; `cuda.0` … (16,) uint8, by place in `devices`.

    Raises:
        CheckpointError: numpy's global generator was replaced by one of another kind.
    """
    _, words, normal = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    if numpy_state["bit_generator"] != "MT19937":
        raise CheckpointError(
            f"numpy's global generator is {numpy_state['bit_generator']}; only MT19937, its "
            "default, can be saved. Give your own generator to the code that needs another."
        )
    numpy_words = [*numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"]]
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_normal": _number(normal),
        "numpy": torch.tensor(numpy_words, dtype=torch.int64),
        "numpy_normal": _number(numpy_state["gauss"] if numpy_state["has_gauss"] else None),
        "torch": torch.get_rng_state(),
    }
    for place, device in enumerate(devices):
        state[f"cuda.{place}"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], devices: Sequence[torch.device | int] = ()) -> None:
    """Let every stream continue from where `rng_state(devices)` found it.

    Raises:
        CheckpointError: other streams, e.g. another number of devices, or values that no stream
            has; no stream was moved then.
    """
    now = rng_state(devices)
    _check(state, now)
    try:
        _set(state, devices)
    # from the libraries' own checks of the values
    except (ValueError, OverflowError, RuntimeError) as error:
        _set(now, devices)
        raise CheckpointError(
            f"The saved random state is damaged: {error}. Resume from another checkpoint."
        ) from None


def _set(state: Mapping[str, Tensor], devices: Sequence[torch.device | int]) -> None:
    words = tuple(state["python"].tolist())
    random.setstate((3, words, _optional(state["python_normal"])))
    *numpy_words, position = state["numpy"].tolist()
    normal = _optional(state["numpy_normal"])
    has_normal, cached = int(normal is not None), normal or 0.0
    key = np.array(numpy_words, dtype=np.uint32)
    np.random.set_state(("MT19937", key, position, has_normal, cached))
    torch.set_rng_state(state["torch"].clone())
    for place, device in enumerate(devices):
        torch.cuda.set_rng_state(state[f"cuda.{place}"].clone(), device)


def _check(state: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    if state.keys() != now.keys():
        raise CheckpointError(
            f"The saved random state has {', '.join(sorted(state))}, and this process needs "
            f"{', '.join(sorted(now))}. Resume on as many devices a process as were saved."
        )
    for name, expected in now.items():
        found = state[name]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise CheckpointError(
                f"The saved random state {name!r} is {found.dtype} {list(found.shape)}, and this "
                f"process has {expected.dtype} {list(expected.shape)}. Resume with the library "
                "versions that saved it."
            )
    for name in ("python", "numpy"):
        *words, position = state[name].tolist()
        # numpy itself checks neither, and would read outside its memory
        if not (all(0 <= word < 2**32 for word in words) and 0 <= position <= WORDS):
            raise CheckpointError(
                f"The saved random state {name!r} holds what no stream has. It is damaged: resume "
                "from another checkpoint."
            )


def _number(value: float | None) -> Tensor:
    return torch.tensor([math.nan if value is None else value], dtype=torch.float64)


def _optional(number: Tensor) -> float | None:
    value = float(number)
    return None if math.isnan(value) else value

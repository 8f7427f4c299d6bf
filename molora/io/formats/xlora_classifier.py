"""The layers of X-LoRA's classifier in a file: every one that its settings ask for, or an error.

Package peft (0.20 to 0.21.2) leaves out those whose number is also an adapter's name, and draws
them anew when it loads, without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from molora.errors import CheckpointError
from molora.io.peft_files import bounded_header
from molora.io.peft_keys import TYPES, examples
from molora.io.tensors import map_tensors


@dataclass(frozen=True, eq=False)
class Dense:
    """One layer: x Wᵀ + b.

    Attributes:
        weight: (out, in).
        bias: (out,), or None if the classifier has none.
    """

    weight: Tensor
    bias: Tensor | None


def read_layers(
    path: Path,
    names: Sequence[str],
    widths: Sequence[int | None],
    *,
    bias: bool,
    allow_reinit: bool,
) -> tuple[Dense | None, ...]:
    """The layers in order.

    Args:
        path: a safetensors file.
        names: of each layer, before ".weight".
        widths: what goes into the first layer, between layers, and out of the last; None: whatever
            the file has.
        bias: whether layers have one.
        allow_reinit: a layer that the file lacks is None, to be drawn anew and trained.

    Raises:
        CheckpointError: a layer that is missing, or anything that is no such layer.
    """
    try:
        infos = bounded_header(path)
        wanted = {name: [f"{name}.weight", *([f"{name}.bias"] if bias else [])] for name in names}
        unknown = sorted({*infos} - {part for parts in wanted.values() for part in parts})
        if unknown:
            raise CheckpointError(
                f"{path} has {examples(unknown)}, which no classifier of these settings has. The "
                "files do not belong together."
            )
        lacking = [part for parts in wanted.values() for part in parts if part not in infos]
        if lacking and not allow_reinit:
            raise CheckpointError(
                f"{path} lacks {examples(lacking)} of the classifier: package peft loses layers "
                "whose numbers are names of adapters. Save the classifier's state_dict() where it "
                "was trained; or give allow_reinit=True and train what is drawn anew."
            )
        tensors = map_tensors(path, infos)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    layers: list[Dense | None] = []
    for number, name in enumerate(names):
        if any(part not in tensors for part in wanted[name]):
            layers.append(None)
            continue
        layer = Dense(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
        _check(path, name, layer, widths[number], widths[number + 1])
        layers.append(layer)
    return tuple(layers)


def _check(path: Path, name: str, layer: Dense, size_in: int | None, size_out: int | None) -> None:
    weight = layer.weight
    fits = weight.dim() == 2 and all(
        expected in (None, size)
        for expected, size in zip((size_out, size_in), weight.shape, strict=False)
    )
    if layer.bias is not None:
        fits = fits and layer.bias.shape == weight.shape[:1]
    types = {str(t.dtype).removeprefix("torch.") for t in (weight, layer.bias) if t is not None}
    if not fits or 0 in weight.shape or not types <= {*TYPES}:
        raise CheckpointError(
            f"{path}: {name!a} has the weight {list(weight.shape)} of {', '.join(sorted(types))}; "
            f"the settings ask for ({size_out or 'out'}, {size_in or 'in'}) of {', '.join(TYPES)}, "
            "with a bias of as many rows. The files do not belong together."
        )
    for tensor in (weight, layer.bias):
        if tensor is not None and not math.isfinite(float(tensor.double().norm())):
            raise CheckpointError(f"{path}: {name!a} holds NaN or infinity. It is damaged.")

"""What a safetensors file says it holds, written and checked before anything is allocated."""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field, NonNegativeInt

from molora.config.base import Frozen
from molora.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes; the header's length is read before anything else, so its claim is not trusted."""
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types that a tensor of a mixture may have, as safetensors and torch name them."""
INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
DTYPES = FLOATS | INTEGERS | {"BOOL": "bool"}
"""Types that a stored tensor may have: the state of training has more than a mixture."""
ITEM_SIZES = {name: getattr(torch, name).itemsize for name in DTYPES.values()}
MAX_SIZE = 2**63
"""No dimension and no offset reaches it."""
MAX_DIMS = 64
METADATA = "__metadata__"
"""A key of the header that is no tensor."""


class TensorInfo(Frozen):
    """Shape and dtype of one stored tensor."""

    shape: tuple[NonNegativeInt, ...]
    """Sizes."""
    dtype: str = Field(pattern=f"^({'|'.join(DTYPES.values())})$")
    """torch's name."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def header_bytes(infos: Mapping[str, TensorInfo]) -> bytes:
    """The start of a safetensors file whose values follow in the order of `infos`."""
    names = {torch_name: name for name, torch_name in DTYPES.items()}
    entries, end = {}, 0
    for name, info in infos.items():
        begin, end = end, end + info.num_bytes
        entries[name] = {
            "dtype": names[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start aligned
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a safetensors file, from its header alone.

    Raises:
        CheckpointError: a file that is no safetensors file, is cut short or longer than its header
            says, or has types that we do not write.
    """
    header, start, size = _read_json(path)
    infos: dict[str, TensorInfo] = {}
    for name, data in header.items():
        if name == METADATA:
            continue
        infos[name], begin, end = _entry(path, name, data)
        if end - begin != infos[name].num_bytes or start + end > size:
            raise CheckpointError(
                f"{path}: {name!r} of {infos[name]} does not take the bytes from {begin} to {end} "
                f"of {size - start} where the header places it. The file is truncated or damaged."
            )
    described = start + sum(info.num_bytes for info in infos.values())
    if described != size:
        raise CheckpointError(
            f"{path} has {size} bytes, but its header describes {described}. The file is truncated "
            "or damaged."
        )
    return infos


def _entry(path: Path, name: str, data: object) -> tuple[TensorInfo, int, int]:
    """A tensor's entry in the header: what it is, and where its values begin and end.

    Written out: a library of adapters has a hundred thousand entries, and a model of each would
    take longer than all the rest. The sizes are bounded before they are multiplied.
    """
    match data:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [begin, end],
            **others,
        } if (
            not others
            and dtype in DTYPES
            and len(shape) <= MAX_DIMS
            and all(type(value) is int and 0 <= value < MAX_SIZE for value in (*shape, begin, end))
        ):
            info = TensorInfo.model_construct(shape=tuple(shape), dtype=DTYPES[dtype])
            return info, begin, end
    raise CheckpointError(
        f"{path}: the header's entry of {name!r} is none that we write: "
        f"{ascii(reprlib.repr(data))[1:-1][:200]}. An entry has a dtype of {', '.join(DTYPES)}, "
        "a shape and two data_offsets."
    )


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Raise ValueError for a key that comes twice: which one counts depends on the reader."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twin, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twin[:80]!a} comes twice")
    return found


def _read_json(path: Path) -> tuple[dict[str, object], int, int]:
    """The header, where the values start, and the size of the file."""
    with path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: it has {size} bytes and its "
                f"header claims {length}."
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_twins)
    # ValueError: bytes that are no text, text that is no JSON, and integers of too many digits
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: {type(header).__name__}, not a dict.")
    return header, 8 + length, size

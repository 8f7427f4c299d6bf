"""The header of a safetensors file: what it may say, and that nothing it says is taken on trust."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from molora.errors import CheckpointError
from molora.io.header import TensorInfo, read_header


def _write(path: Path, header: str, values: int = 24) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * values)
    return path


def _entry(**changes: Any) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}})


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.ones(()),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert {name: (info.shape, info.dtype) for name, info in found.items()} == {
        "a": ((2, 3), "float32"),
        "b": ((4,), "bfloat16"),
        "c": ((), "float32"),
    }
    assert found["a"] == TensorInfo.parse({"shape": (2, 3), "dtype": "float32"})
    assert read_header(_write(path, _entry())) == {"a": found["a"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F8"},
        {"dtype": None},
        {"dtype": ["F32"]},
        {"shape": None},
        {"shape": "23"},
        {"shape": [2.0, 3]},
        {"shape": [True, 6]},
        {"shape": ["2", 3]},
        {"shape": [-2, -3]},
        {"shape": [2**63, 0]},
        {"shape": [10**4000, 10**4000]},
        {"shape": [1] * 65},
        {"shape": [2**62] * 100_000},
        {"data_offsets": [0]},
        {"data_offsets": [0, 24, 24]},
        {"data_offsets": [-24, 0]},
        {"data_offsets": [0.0, 24.0]},
        {"data_offsets": {"begin": 0}},
        {"more": 1},
        {"shape": [[[[[[[[[[[]]]]]]]]]]]},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_entries_that_are_none_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="entry of 'a' is none that we write") as caught:
        read_header(_write(tmp_path / "a", _entry(**changes)))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("data", [None, [], 3, "F32", {}])
def test_entries_that_are_no_dict_are_refused(tmp_path: Path, data: object) -> None:
    with pytest.raises(CheckpointError, match="none that we write"):
        read_header(_write(tmp_path / "a", json.dumps({"a": data})))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2, 4]},
        {"shape": [2**62] * 64},  # more digits than Python writes out
        {"data_offsets": [8, 32]},
        {"data_offsets": [24, 0]},
        {"data_offsets": [2**62, 2**62 + 24]},
    ],
)
def test_places_that_are_not_in_the_file_are_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="where the header places it"):
        read_header(_write(tmp_path / "a", _entry(**changes)))


@pytest.mark.parametrize("values", [23, 25, 0])
def test_the_values_fill_the_file(tmp_path: Path, values: int) -> None:
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_header(_write(tmp_path / "a", _entry(), values))


@pytest.mark.parametrize(
    "header",
    [
        _entry()[:-1] + "," + _entry()[1:],
        _entry().replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"'),
    ],
)
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(CheckpointError, match=r"damaged header: the key '(a|dtype)' comes twice"):
        read_header(_write(tmp_path / "a", header))


@pytest.mark.parametrize("header", ["[]", "3", "{", "", '{"a": ' + "9" * 5000 + "}", "[" * 9999])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(CheckpointError, match=r"damaged header|truncated or not"):
        read_header(_write(tmp_path / "a", header))

"""Damage of any kind gives a CheckpointError, or the same mixture where it changed no meaning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saved_mixtures import (
    MANIFEST,
    Snapshot,
    join_header,
    read_tensors,
    split_header,
    tensors_path,
)
from tiny_models import tiny
from torch import Tensor, nn

import molora
from molora import io

T = TypeVar("T")
Damage = list[tuple[float, int]]
DAMAGE: st.SearchStrategy[Damage] = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4
)
"""Where in the file, and what its byte is xor-ed with."""
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text()
    | st.sampled_from(["F32", "I64", "float32", "model"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """One base for all examples: each must leave it as it was."""
    return tiny("llama")


@pytest.fixture(scope="module")
def untouched(model: nn.Module) -> Snapshot:
    return Snapshot.of(model)


@pytest.fixture(scope="module")
def values(pristine: Path) -> dict[str, Tensor]:
    return read_tensors(pristine)


@pytest.fixture(scope="module")
def scratch(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both files, whose content each example writes anew."""
    directory = tmp_path_factory.mktemp("fuzz")
    _restore(directory, pristine)
    return directory


def _restore(directory: Path, pristine: Path) -> None:
    for path in pristine.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())


def _flip(data: bytes, damage: Damage) -> bytes:
    flipped = bytearray(data)
    for share, mask in damage:
        flipped[int(share * len(flipped))] ^= mask
    return bytes(flipped)


def _result(read: Callable[[], T]) -> T | molora.CheckpointError:
    try:
        return read()
    except molora.CheckpointError as error:
        return error


def _load_or_refuse(
    directory: Path, model: nn.Module, untouched: Snapshot, values: dict[str, Tensor]
) -> bool:
    """Whether it loaded; if so with the saved values, and in any case the base is whole after."""
    try:
        mixture = molora.load(model, directory)
    except molora.CheckpointError:
        untouched.assert_same(model)
        return False
    state = mixture.state_dict()
    assert state.keys() == values.keys()
    assert all(torch.equal(state[name], values[name]) for name in values)
    mixture.detach()
    untouched.assert_same(model)
    return True


@given(damage=DAMAGE)
def test_flipped_bytes_of_the_manifest(
    damage: Damage,
    scratch: Path,
    pristine: Path,
    model: nn.Module,
    untouched: Snapshot,
    values: dict[str, Tensor],
) -> None:
    _restore(scratch, pristine)
    data = (pristine / MANIFEST).read_bytes()
    (scratch / MANIFEST).write_bytes(_flip(data, damage))
    _load_or_refuse(scratch, model, untouched, values)


@given(damage=DAMAGE)
def test_flipped_bytes_of_the_tensors(
    damage: Damage,
    scratch: Path,
    pristine: Path,
    model: nn.Module,
    untouched: Snapshot,
    values: dict[str, Tensor],
) -> None:
    _restore(scratch, pristine)
    data = tensors_path(pristine).read_bytes()
    flipped = _flip(data, damage)
    tensors_path(scratch).write_bytes(flipped)
    assert _load_or_refuse(scratch, model, untouched, values) == (flipped == data)


@given(damage=DAMAGE)
def test_flipped_bytes_of_the_header(damage: Damage, scratch: Path, pristine: Path) -> None:
    """The values are most of the file: this looks at the rest more closely."""
    path = tensors_path(scratch)
    data = tensors_path(pristine).read_bytes()
    start = len(data) - len(split_header(tensors_path(pristine))[1])
    path.write_bytes(_flip(data[:start], damage) + data[start:])
    try:
        header = io.read_header(path)
    except molora.CheckpointError:
        return
    assert sum(info.num_bytes for info in header.values()) == len(data) - start


@given(position=st.floats(0, 1, exclude_max=True), value=JSON)
def test_any_json_anywhere_in_the_header(
    position: float, value: object, scratch: Path, pristine: Path
) -> None:
    path = tensors_path(scratch)
    header, values = split_header(tensors_path(pristine))
    names = list(header)
    name = names[int(position * len(names))]
    for field in (None, *header[name]):
        changed = {**header, name: value if field is None else {**header[name], field: value}}
        join_header(path, json.dumps(changed), values)
        header_or_error = _result(lambda: io.read_header(path))
        if isinstance(header_or_error, molora.CheckpointError):
            assert str(path) in str(header_or_error)
        else:
            assert header_or_error.keys() <= set(names)


@given(data=st.data(), value=JSON)
def test_any_json_anywhere_in_the_manifest(
    data: st.DataObject, value: object, pristine: Path
) -> None:
    text = (pristine / MANIFEST).read_text()
    manifest = json.loads(text)
    parent = manifest
    key = data.draw(st.sampled_from(sorted(parent)))
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.booleans()):
        parent = parent[key]
        keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))
        key = data.draw(st.sampled_from(list(keys)))
    same = json.dumps(parent[key]) == json.dumps(value)
    parent[key] = value
    parsed = _result(lambda: io.parse_manifest(json.dumps(manifest), where="here"))
    if isinstance(parsed, molora.CheckpointError):
        assert all(c.isprintable() or c == "\n" for c in str(parsed))
    else:
        assert same
        assert parsed == io.parse_manifest(text, where="here")


def test_an_undamaged_directory_loads(
    scratch: Path,
    pristine: Path,
    model: nn.Module,
    untouched: Snapshot,
    values: dict[str, Tensor],
) -> None:
    """Negative control: the examples above are refused for their damage alone."""
    _restore(scratch, pristine)
    assert _load_or_refuse(scratch, model, untouched, values)

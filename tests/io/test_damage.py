"""A tensor file that is not what was saved is refused by name, and the model stays as it was."""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_checkpoints import BASE, CONFIG
from saved_mixtures import (
    LORA_A,
    ROUTER,
    Snapshot,
    edit_tensors,
    join_header,
    logits,
    read_tensors,
    save_tiny,
    seal,
    split_header,
    tensors_path,
)
from tiny_models import tiny
from torch import Tensor, nn

import molora
from molora import io

Tensors = dict[str, Tensor]


def _delete(tensors: Tensors) -> None:
    del tensors[LORA_A]


def _rename(tensors: Tensors) -> None:
    tensors[LORA_A.replace("lora_A", "lora_C")] = tensors.pop(LORA_A)


def _transpose(tensors: Tensors) -> None:
    tensors[LORA_A] = tensors[LORA_A].mT


def _reshape(tensors: Tensors) -> None:
    tensors[LORA_A] = tensors[LORA_A].flatten(0, 1)


def _drop_expert(tensors: Tensors) -> None:
    tensors[LORA_A] = tensors[LORA_A][:-1]


def _cast(tensors: Tensors) -> None:
    tensors[LORA_A] = tensors[LORA_A].bfloat16()


def _add(tensors: Tensors) -> None:
    tensors[LORA_A + ".more"] = tensors[LORA_A].clone()


def _traverse(tensors: Tensors) -> None:
    tensors["../../" + LORA_A] = tensors[LORA_A].clone()


def _nan(tensors: Tensors) -> None:
    tensors[LORA_A][4, 3, 2] = torch.nan


def _infinity(tensors: Tensors) -> None:
    tensors[LORA_A][0, 0, 0] = -torch.inf


CHANGES = [_delete, _rename, _transpose, _reshape, _drop_expert, _cast, _add, _traverse]


@pytest.mark.parametrize("sealed", [False, True], ids=["file", "file_and_manifest"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_changed_tensor_is_named_and_the_model_left_alone(
    change: Callable[[Tensors], None],
    sealed: bool,
    saved: Path,
    base: nn.Module,
    before: Snapshot,
) -> None:
    edit_tensors(saved, change)
    if sealed:
        seal(saved)
    with pytest.raises(molora.CheckpointError, match=re.escape(LORA_A)):
        molora.load(base, saved)
    before.assert_same(base)


def test_a_file_that_was_rewritten_unchanged_still_loads(
    saved: Path, base: nn.Module, tmp_path: Path
) -> None:
    """Negative control of the test above, for rewriting and for sealing."""
    plain = logits(base)
    edit_tensors(saved, lambda tensors: None)
    seal(saved)
    molora.load(base, saved)
    assert torch.equal(logits(base), logits(save_tiny(tmp_path / "again").model))
    assert (logits(base) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("change", [_nan, _infinity])
def test_non_finite_values_are_not_loaded(
    change: Callable[[Tensors], None], saved: Path, base: nn.Module, before: Snapshot
) -> None:
    edit_tensors(saved, change)
    seal(saved)
    with pytest.raises(molora.CheckpointError, match=rf"{re.escape(LORA_A)} holds NaN or infinity"):
        molora.load(base, saved)
    before.assert_same(base)


@pytest.mark.parametrize("name", [LORA_A, ROUTER])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_are_not_saved(name: str, value: float, tmp_path: Path) -> None:
    mixture = save_tiny(tmp_path / "old")
    mixture.state_dict()[name].view(-1)[-1] = value
    for directory in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(molora.CheckpointError, match=rf"{re.escape(name)} holds NaN"):
            mixture.save(directory)
    assert not (tmp_path / "new").exists()
    molora.load(tiny("llama"), tmp_path / "old")


def test_a_mixture_has_floats_alone(tmp_path: Path) -> None:
    """Other types of the file's format belong to the state of training."""
    state = {"lora_A": torch.arange(6).reshape(1, 2, 3)}
    with pytest.raises(molora.CheckpointError, match=r"lora_A is torch\.int64; a mixture stores"):
        io.write(tmp_path, state=state, mixture=CONFIG, base=BASE, molora_version="0.1.0")
    io.write(
        tmp_path,
        state={"lora_A": state["lora_A"].double()},
        mixture=CONFIG,
        base=BASE,
        molora_version="0.1.0",
    )
    assert io.read_manifest(tmp_path).tensors["lora_A"].dtype == "float64"


def test_one_changed_value_is_found_by_the_hash(
    saved: Path, base: nn.Module, before: Snapshot
) -> None:
    def nudge(tensors: Tensors) -> None:
        tensors[LORA_A][0, 0, 0] += 1e-3

    edit_tensors(saved, nudge)
    with pytest.raises(molora.CheckpointError, match="does not have the SHA-256"):
        molora.load(base, saved)
    before.assert_same(base)


@pytest.mark.parametrize("twentieths", range(20))
def test_a_file_cut_anywhere_is_refused(
    twentieths: int, saved: Path, base: nn.Module, before: Snapshot
) -> None:
    path = tensors_path(saved)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * twentieths // 20])
    with pytest.raises(molora.CheckpointError, match=rf"{path.name}.*truncated"):
        molora.load(base, saved)
    before.assert_same(base)


@pytest.mark.parametrize("cut", [-1, 1, 8])
def test_a_file_one_byte_off_is_refused(
    cut: int, saved: Path, base: nn.Module, before: Snapshot
) -> None:
    path = tensors_path(saved)
    data = path.read_bytes()
    path.write_bytes(data[:cut] if cut < 0 else data + b"\0" * cut)
    with pytest.raises(molora.CheckpointError, match="truncated or damaged"):
        molora.load(base, saved)
    before.assert_same(base)


@pytest.mark.parametrize(
    "claim",
    [0, 1, 7, 2**31, 2**63, 2**64 - 1, "file size", "one less", "one more"],
)
def test_a_header_that_lies_about_its_length_is_refused(
    claim: int | str, saved: Path, base: nn.Module, before: Snapshot
) -> None:
    """2**63 and above are the negative numbers of a signed reader."""
    path = tensors_path(saved)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    lies = {"file size": len(data) - 8, "one less": length - 1, "one more": length + 1}
    lie = claim if isinstance(claim, int) else lies[claim]
    path.write_bytes(struct.pack("<Q", lie) + data[8:])
    with pytest.raises(molora.CheckpointError, match=path.name):
        molora.load(base, saved)
    before.assert_same(base)


def _entry(**changes: Any) -> Callable[[dict[str, Any]], str]:
    def edit(header: dict[str, Any]) -> str:
        return json.dumps({**header, LORA_A: {**header[LORA_A], **changes}})

    return edit


HEADERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "foreign dtype": _entry(dtype="I64"),
    "narrower dtype": _entry(dtype="BF16"),
    "negative size": _entry(shape=[-5, -4, 40]),
    "huge size": _entry(shape=[2**62, 4, 40]),
    "size as text": _entry(shape="5440"),
    "no size": _entry(shape=None),
    "offsets as text": _entry(data_offsets=["0", "x"]),
    "offsets reversed": _entry(data_offsets=[3200, 0]),
    "offsets outside": _entry(data_offsets=[10**9, 10**9 + 3200]),
    "one offset": _entry(data_offsets=[0]),
    "offset of 5000 digits": lambda header: json.dumps(header).replace("[0,", f"[{'9' * 5000},", 1),
    "unknown field": _entry(code="import os"),
    "entry is a list": lambda header: json.dumps({**header, LORA_A: [1]}),
    "list": lambda header: json.dumps([header]),
    "number": lambda header: "1",
    "deeply nested": lambda header: "[" * 100_000,
    "no JSON": lambda header: json.dumps(header)[:-1],
    "no text": lambda header: "\0" * 50,
}


@pytest.mark.parametrize("edit", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_no_mixture_has_is_refused(
    edit: Callable[[dict[str, Any]], str], saved: Path, base: nn.Module, before: Snapshot
) -> None:
    path = tensors_path(saved)
    header, values = split_header(path)
    join_header(path, edit(header), values)
    with pytest.raises(molora.CheckpointError, match=path.name):
        molora.load(base, saved)
    before.assert_same(base)


def test_tensors_that_share_their_bytes_are_refused(
    saved: Path, base: nn.Module, before: Snapshot
) -> None:
    path = tensors_path(saved)
    header, values = split_header(path)
    twin = LORA_A.replace("layers.1", "layers.0")
    header[twin] = {**header[LORA_A]}
    join_header(path, json.dumps(header), values)
    with pytest.raises(molora.CheckpointError, match="truncated or damaged"):
        molora.load(base, saved)
    before.assert_same(base)


def test_the_files_hold_json_and_numbers_and_nothing_else(saved: Path) -> None:
    """Neither file has room for an object that would have to be unpickled."""
    path = tensors_path(saved)
    header, values = split_header(path)
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert spans[0][0] == 0
    assert spans[-1][1] == len(values)
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    assert values == b"".join(
        read_tensors(saved)[name].numpy().tobytes()
        for name, _ in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    )
    assert json.loads((saved / "molora.json").read_text())["format_version"] == 1
    assert {file.suffix for file in saved.iterdir()} == {".json", ".safetensors"}

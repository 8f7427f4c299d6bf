"""A manifest that is not what was saved is refused, and the model stays as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_mixtures import MANIFEST, Snapshot, edit_manifest, logits, read_manifest
from torch import nn

import molora
from molora import io

Json = dict[str, Any]


def _set(path: str, value: Any) -> Callable[[Json], None]:
    def edit(data: Json) -> None:
        *parents, last = path.split("/")
        for key in parents:
            data = data[int(key)] if isinstance(data, list) else data[key]
        data[last] = value

    return edit


EDITS: dict[str, tuple[Callable[[Json], None], str]] = {
    "newer": (_set("format_version", 2), "format version 2; this molora reads up to 1. Upgrade"),
    "newer as float": (_set("format_version", 2.0), r"format version 2\.0"),
    "newer as text": (_set("format_version", "2"), "format_version"),
    "no version": (lambda data: data.pop("format_version"), "format_version: Field required"),
    "unknown key": (_set("pickle", "cos"), "unknown key 'pickle'"),
    "misspelt key": (
        _set("mixture/groups/0/rnak", 4),
        "mixture.groups.0.*unknown key 'rnak'. Close names: rank",
    ),
    "no mixture": (lambda data: data.pop("mixture"), "mixture: Field required"),
    "no base": (lambda data: data.pop("base"), "base: Field required"),
    "foreign dtype": (_set("tensors", {"a": {"shape": [1], "dtype": "object"}}), "tensors.a.dtype"),
    "integers": (
        _set("tensors/a", {"shape": [1], "dtype": "int64"}),
        "tensors: a is int64; a mixture has float64",
    ),
    "negative size": (_set("tensors", {"a": {"shape": [-1], "dtype": "float32"}}), "tensors.a.sha"),
    "other hash": (_set("sha256", "0" * 64), r"has no molora-0{16}\.safetensors"),
    "hash that is a path": (_set("sha256", "../../../etc/passwd"), "sha256: String should match"),
    "hash with a path": (_set("sha256", "../" + "0" * 61), "sha256: String should match"),
    "hash and a line": (_set("sha256", "0" * 64 + "\n"), "sha256: String should match"),
    "no experts": (_set("mixture/groups/0/num_experts", 0), "num_experts"),
    "billions of experts": (
        _set("mixture/groups/0/num_experts", 2**31),
        r"experts of at least \d+ parameters, but only \d+ are stored",
    ),
    "more layers": (_set("mixture/groups/0/rank", [4, 4, 4]), "rank"),
    "other targets": (_set("mixture/groups/0/targets", ["q_proj"]), "unexpected .*mlp"),
    "no such target": (_set("mixture/groups/0/targets", ["q_porj"]), "q_porj"),
    "regex of another": (_set("mixture/groups/0/targets", ["re:.*lm_head"]), "lm_head"),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS.keys())
def test_a_manifest_that_does_not_fit_is_refused(
    edit: Callable[[Json], None],
    message: str,
    saved: Path,
    base: nn.Module,
    before: Snapshot,
) -> None:
    """Its checksum fits, as if its author meant it."""
    edit_manifest(saved, edit)
    with pytest.raises(molora.CheckpointError, match=message):
        molora.load(base, saved)
    before.assert_same(base)


SILENT = {
    "alpha": _set("mixture/groups/0/expert/alpha", 17.0),
    "temperature": _set("mixture/groups/0/router/temperature", 0.5),
    "losses": _set("mixture/losses", []),
    "base name": _set("base/name", "another/model"),
    "version": _set("molora_version", "9.9.9"),
}


@pytest.mark.parametrize("edit", SILENT.values(), ids=SILENT.keys())
def test_a_changed_value_that_would_load_is_found_by_the_checksum(
    edit: Callable[[Json], None], saved: Path, base: nn.Module, before: Snapshot
) -> None:
    edit_manifest(saved, edit, sealed=False)
    with pytest.raises(molora.CheckpointError, match="does not have the checksum that it states"):
        molora.load(base, saved)
    before.assert_same(base)


@pytest.mark.parametrize("edit", SILENT.values(), ids=SILENT.keys())
def test_the_same_values_with_their_checksum_load(
    edit: Callable[[Json], None], saved: Path, base: nn.Module
) -> None:
    """Negative control of the test above."""
    edit_manifest(saved, edit)
    molora.load(base, saved)


TEXTS = {
    "empty": "",
    "cut": '{"format_version": 1, "mix',
    "no JSON": "format_version: 1",
    "list": "[]",
    "null": "null",
    "number": "1",
    "text": '"molora"',
    "deeply nested": "[" * 100_000,
    "deeply nested value": '{"format_version": ' + '{"a":' * 5000 + "1" + "}" * 5001,
    "number of 5000 digits": '{"format_version": ' + "9" * 5000 + "}",
    "not a number": '{"format_version": NaN}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_manifest_that_is_no_manifest_is_refused(
    text: str, saved: Path, base: nn.Module, before: Snapshot
) -> None:
    (saved / MANIFEST).write_text(text)
    with pytest.raises(molora.CheckpointError, match=re.escape(MANIFEST)):
        molora.load(base, saved)
    before.assert_same(base)


@pytest.mark.parametrize("data", [b"\xff\xfe{", b"\x80\x04\x95", b"PK\x03\x04"])
def test_a_manifest_that_is_no_text_is_refused(data: bytes, saved: Path, base: nn.Module) -> None:
    (saved / MANIFEST).write_bytes(data)
    with pytest.raises(molora.CheckpointError, match="is not readable JSON"):
        molora.load(base, saved)


def test_the_layout_of_the_text_is_free(saved: Path, base: nn.Module) -> None:
    text = json.dumps(dict(reversed(read_manifest(saved).items())), ensure_ascii=False)
    assert text != (saved / MANIFEST).read_text()
    plain = logits(base)
    mixture = molora.load(base, saved)
    expected = logits(base)
    mixture.detach()
    (saved / MANIFEST).write_text("\n" + text)
    molora.load(base, saved)
    assert torch.equal(logits(base), expected)
    assert (logits(base) - plain).abs().max() > 1e-2


def test_control_characters_do_not_reach_the_terminal(saved: Path, base: nn.Module) -> None:
    edit_manifest(saved, lambda data: data["tensors"].update({"\x1b[2J\ud800": {"shape": 1}}))
    with pytest.raises(molora.CheckpointError) as caught:
        molora.load(base, saved)
    message = str(caught.value)
    assert r"\x1b[2J" in message
    assert all(character.isprintable() or character == "\n" for character in message)


@pytest.mark.parametrize("name", sorted(molora.methods()))
def test_every_preset_survives_the_manifest(name: str) -> None:
    config = getattr(molora.presets, name)()
    manifest = io.Manifest(
        format_version=1,
        molora_version="0",
        mixture=config,
        base=io.BaseFingerprint(name="é", config_sha256={}, weights_sha256={}),
        tensors={},
        sha256="0" * 64,
    )
    text = io.dump_manifest(manifest)
    assert io.parse_manifest(text, where="here") == manifest
    assert io.parse_manifest(text, where="here").mixture == config

"""A checkpoint that is not what was written is refused, by the name of the file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from saved_checkpoints import copy, is_exact, same_bits, save_checkpoint, trainer_tensors

import molora
from molora import io

FILES = [
    "checkpoint.json",
    "trainer_state.json",
    "molora.json",
    "molora-*.safetensors",
    "trainer-*.safetensors",
]


@pytest.fixture(scope="session")
def pristine_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints"), 7)


@pytest.fixture
def directory(pristine_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy(pristine_checkpoint, tmp_path / "checkpoint-7")


def path_of(directory: Path, pattern: str) -> Path:
    (path,) = directory.glob(pattern)
    return path


def seal(directory: Path, edit: Callable[[dict[str, Any]], object] = lambda data: None) -> None:
    """Edit the manifest, and let its own checksum fit again."""
    path = directory / "checkpoint.json"
    data = json.loads(path.read_text())
    del data["checksum"]
    edit(data)
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**data, "checksum": hashlib.sha256(text.encode()).hexdigest()}))


def adopt(directory: Path, name: str) -> None:
    """Let the manifest promise what the file now is; trainer files are renamed to their hash."""
    path = path_of(directory, name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    new = path.with_name(f"trainer-{digest[:16]}.safetensors") if "trainer-" in name else path
    path.rename(new)

    def edit(data: dict[str, Any]) -> None:
        del data["files"][path.name]
        data["files"][new.name] = {"bytes": new.stat().st_size, "sha256": digest}

    seal(directory, edit)


def refused(directory: Path, message: str) -> None:
    with pytest.raises(molora.CheckpointError, match=message):
        io.read_checkpoint(directory)
    found, skipped = io.newest_complete(directory.parent)
    assert found is None
    assert re.search(message, skipped[directory])


def test_an_undamaged_copy_is_read(directory: Path) -> None:
    """Negative control of all tests below, for copying, sealing and adopting too."""
    assert is_exact(io.read_checkpoint(directory))
    seal(directory)
    for name in FILES[1:]:
        adopt(directory, name)
    assert is_exact(io.read_checkpoint(directory))


@pytest.mark.parametrize("pattern", FILES)
def test_a_missing_file_is_named(pattern: str, directory: Path) -> None:
    path = path_of(directory, pattern)
    path.unlink()
    refused(directory, f"has no {re.escape(path.name)}")


@pytest.mark.parametrize("pattern", FILES[1:])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(share: float, pattern: str, directory: Path) -> None:
    path = path_of(directory, pattern)
    os.truncate(path, int(path.stat().st_size * share))
    refused(directory, rf"{re.escape(path.name)} has \d+ bytes, but .* truncated")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_manifest_is_named(share: float, directory: Path) -> None:
    path = directory / "checkpoint.json"
    os.truncate(path, int(path.stat().st_size * share))
    refused(directory, r"checkpoint\.json is not readable JSON")


@pytest.mark.parametrize("pattern", FILES[1:])
def test_a_longer_file_is_named(pattern: str, directory: Path) -> None:
    path = path_of(directory, pattern)
    path.write_bytes(path.read_bytes() + b" ")
    refused(directory, rf"{re.escape(path.name)} has \d+ bytes, but")


@pytest.mark.parametrize("pattern", FILES)
def test_a_link_is_named_and_what_it_leads_to_is_not_read(pattern: str, directory: Path) -> None:
    path = path_of(directory, pattern)
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")
    refused(directory, f"{re.escape(path.name)} is a link")


@pytest.mark.parametrize("pattern", FILES)
def test_a_directory_in_the_place_of_a_file_is_named(pattern: str, directory: Path) -> None:
    path = path_of(directory, pattern)
    path.unlink()
    path.mkdir()
    refused(directory, f"has no {re.escape(path.name)}")


@given(
    pattern=st.sampled_from(FILES),
    share=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
)
def test_any_changed_byte_is_found(
    pattern: str, share: float, mask: int, pristine_checkpoint: Path
) -> None:
    path = path_of(pristine_checkpoint, pattern)
    original = path.read_bytes()
    changed = bytearray(original)
    changed[int(share * len(changed))] ^= mask
    path.write_bytes(changed)
    try:
        if pattern == "checkpoint.json" and _same_json(changed, original):
            assert is_exact(io.read_checkpoint(pristine_checkpoint))
        else:
            with pytest.raises(molora.CheckpointError, match=re.escape(path.name)):
                io.read_checkpoint(pristine_checkpoint)
    finally:
        path.write_bytes(original)
    assert is_exact(io.read_checkpoint(pristine_checkpoint))


def _same_json(first: bytes, second: bytes) -> bool:
    try:
        return bool(json.loads(first.decode()) == json.loads(second.decode()))
    except ValueError:
        return False


def _file(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """An entry of the manifest, added or changed."""

    def edit(data: dict[str, Any]) -> None:
        entry = data["files"].get(name, {"bytes": 1, "sha256": "0" * 64})
        data["files"][name] = {**entry, **changes}

    return edit


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update({name: value})


def _rename_tensors(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        old = next(key for key in data["files"] if key.startswith("trainer-"))
        data["files"][name] = data["files"].pop(old)

    return edit


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (_set("format_version", 2), "format version 2; this molora reads up to 1. Upgrade"),
    "no version": (lambda data: data.pop("format_version"), "format_version: Field required"),
    "unknown key": (_set("code", "import os"), "unknown key 'code'"),
    "path": (_file("../checkpoint-8/molora.json"), "files.*should match pattern"),
    "absolute path": (_file("/etc/passwd"), "files.*should match pattern"),
    "up": (_file(".."), "files.*should match pattern"),
    "hidden": (_file(".bashrc"), "files.*should match pattern"),
    "name and a line": (_file("a\n"), "should match pattern"),
    "manifest in itself": (_file("checkpoint.json"), "checkpoint.json itself must not"),
    "no state": (lambda data: data["files"].pop("trainer_state.json"), "trainer_state.json must"),
    "no tensors": (
        lambda data: data.update(
            files={k: v for k, v in data["files"].items() if "trainer-" not in k}
        ),
        "one file trainer-HASH",
    ),
    "two tensor files": (_file("trainer-" + "0" * 16 + ".safetensors"), "one file trainer-HASH"),
    "tensors of another hash": (
        _rename_tensors("trainer-" + "0" * 16 + ".safetensors"),
        "one file trainer-HASH",
    ),
    "other hash": (_file("trainer_state.json", sha256="0" * 64), "trainer_state.json does not"),
    "no hash": (_file("trainer_state.json", sha256="x"), "sha256: String should match"),
    "negative size": (_file("trainer_state.json", bytes=-1), "bytes: Input should be"),
    "missing file": (_file("more.json"), "has no more.json"),
    "negative step": (_set("step", -1), "step: Input should be"),
    "no process": (_set("world_size", 0), "world_size: Input should be"),
    "stage": (_set("stage", 4), "stage: Input should be"),
    "files as list": (_set("files", []), "files: Input should be"),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS.keys())
def test_a_manifest_that_no_checkpoint_has_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, directory: Path
) -> None:
    """Its checksum fits, as if its author meant it."""
    seal(directory, edit)
    refused(directory, message)


@pytest.mark.parametrize("key", ["step", "world_size", "stage", "molora_version"])
def test_a_changed_value_is_found_by_the_checksum(key: str, directory: Path) -> None:
    path = directory / "checkpoint.json"
    data = json.loads(path.read_text())
    data[key] = 1 if key != "molora_version" else "9"
    path.write_text(json.dumps(data))
    refused(directory, r"checkpoint\.json does not have the checksum that it states")


TEXTS = {
    "list": "[]",
    "deep": "[" * 100_000,
    "deep value": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "no JSON": "{",
    "no text": "\udcff\udcfe",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", ["checkpoint.json", "trainer_state.json"])
def test_json_that_is_none_or_bottomless_is_named(name: str, text: str, directory: Path) -> None:
    (directory / name).write_bytes(text.encode(errors="surrogateescape"))
    if name == "trainer_state.json":
        adopt(directory, name)
    refused(directory, rf"{re.escape(name)} (is not readable JSON|is damaged: list|holds list)")


@pytest.mark.parametrize("name", ["checkpoint.json", "trainer_state.json"])
def test_json_larger_than_any_of_ours_is_not_read(name: str, directory: Path) -> None:
    """The file is sparse: it takes no room."""
    os.truncate(directory / name, 2**27 + 1)
    if name == "trainer_state.json":
        adopt(directory, name)
    refused(directory, rf"{re.escape(name)} has 134217729 bytes, and a JSON file of ours at most")


def _other_dtype(path: Path) -> None:
    save_file({"c": torch.zeros(3, dtype=torch.complex64)}, path)


def _too_long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def _lying_header(path: Path) -> None:
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")


def _huge_tensor(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}
    header = json.dumps({"huge": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("change", [_other_dtype, _too_long, _lying_header, _huge_tensor])
def test_a_tensor_file_that_we_do_not_write_is_refused_though_its_hash_fits(
    change: Callable[[Path], None], directory: Path
) -> None:
    change(path_of(directory, "trainer-*.safetensors"))
    adopt(directory, "trainer-*.safetensors")
    refused(directory, r"trainer-\w+\.safetensors")


def test_a_tensor_file_that_changed_since_it_was_checked_is_refused(directory: Path) -> None:
    found = io.read_checkpoint(directory)
    os.truncate(found.tensors_file, 100)
    with pytest.raises(molora.CheckpointError, match="truncated"):
        found.tensors()
    found.tensors_file.unlink()
    with pytest.raises(molora.CheckpointError, match=r"cannot be read: .*No such file"):
        found.tensors()


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(molora.CheckpointError, match="nowhere is not a directory"):
        io.read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(molora.CheckpointError, match="file is not a directory"):
        io.read_checkpoint(tmp_path / "file")


def test_files_that_the_manifest_does_not_name_are_passed_over(directory: Path) -> None:
    (directory / "notes.txt").write_text("mine")
    (directory / f"trainer-{'0' * 16}.safetensors").write_bytes(b"left by a killed save")
    (directory / ".molora.00.partial").write_bytes(b"left by another")
    found = io.read_checkpoint(directory)
    assert is_exact(found)
    assert same_bits(found.tensors(), trainer_tensors(7))

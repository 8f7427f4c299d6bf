"""The files of adapters in other places: what torch saved, and the cache of the hub."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft_adapters import CONFIG, TENSORS, save_adapter
from safetensors.torch import load_file
from torch import Tensor

import molora
from molora.errors import CheckpointError, ConfigError
from molora.io import torch_file
from molora.io.adapter import Adapter
from molora.io.peft_adapter import read_adapter

BIN = "adapter_model.bin"


def _assert_same(one: Adapter, other: Adapter) -> None:
    assert one.modules.keys() == other.modules.keys()
    for name, module in one.modules.items():
        assert torch.equal(module.lora_A, other.modules[name].lora_A)
        assert torch.equal(module.lora_B, other.modules[name].lora_B)
        assert module.update_norm == other.modules[name].update_norm > 0


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter with both files."""
    save_adapter(tmp_path / "adapter")
    torch.save(load_file(tmp_path / "adapter" / TENSORS), tmp_path / "adapter" / BIN)
    return tmp_path / "adapter"


def test_what_torch_saved_is_read_where_it_is_asked_for(saved: Path) -> None:
    expected = read_adapter(saved, allow_pickle=True)
    assert expected.notes == (f"{BIN} was not read",)
    (saved / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"can run code .* allow_pickle=True"):
        read_adapter(saved)
    _assert_same(read_adapter(saved, allow_pickle=True), expected)
    assert not read_adapter(saved, allow_pickle=True).notes
    _assert_same(molora.load_experts({"a": saved}, allow_pickle=True).adapters["a"], expected)


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import pathlib; pathlib.Path('ran').write_text('x')",)


def _sparse(path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, path)


def _compressed(path: Path, tensor: Tensor) -> None:
    plain = path.with_suffix(".plain")
    torch.save({"a": tensor}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda p: torch.save({"a": _Hostile()}, p), "holds more than tensors"),
    "a module": (lambda p: torch.save(torch.nn.Linear(2, 2), p), "holds more than tensors"),
    "a list": (lambda p: torch.save([torch.ones(3)], p), "no named tensors but list"),
    "numbers": (lambda p: torch.save({3: torch.ones(3)}, p), "no named tensors"),
    "text": (lambda p: torch.save({"a": "b"}, p), "'a' is no dense tensor"),
    "sparse": (_sparse, "'a' is no dense tensor"),
    "meta": (lambda p: torch.save({"a": torch.ones(3, device="meta")}, p), "no dense tensor"),
    "expanded": (lambda p: torch.save({"a": torch.ones(1).expand(10**9)}, p), "no dense tensor"),
    "shared": (
        lambda p: torch.save(dict.fromkeys("abcdefgh", torch.ones(10**6)), p),
        "share memory",
    ),
    "complex": (lambda p: torch.save({"a": torch.ones(3, dtype=torch.cfloat)}, p), "complex64"),
    "a bomb": (lambda p: _compressed(p, torch.zeros(10**6)), "compressed or overlong"),
    "compressed noise": (
        lambda p: _compressed(p, torch.randint(256, (10**5,), dtype=torch.uint8)),
        "compressed or overlong",
    ),
    "old": (
        lambda p: torch.save({"a": torch.ones(3)}, p, _use_new_zipfile_serialization=False),
        "no file as torch writes it since",
    ),
    "no archive": (lambda p: p.write_bytes(b"\x80\x04cos\nsystem\n"), "no file as torch writes"),
    "nothing": (lambda p: p.write_bytes(b""), "no file as torch writes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_holds_more_than_tensors_is_refused_unread(
    saved: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = HOSTILE[kind]
    (saved / TENSORS).unlink()
    monkeypatch.chdir(saved)
    make(saved / BIN)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(saved, allow_pickle=True)
    assert not (saved / "ran").exists()


def test_the_part_that_says_what_there_is_is_bounded(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(saved / BIN) as archive:
        size = max(p.file_size for p in archive.infolist() if p.filename.endswith(".pkl"))
    monkeypatch.setattr(torch_file, "MAX_OBJECTS", size)
    assert torch_file.read_tensors(saved / BIN)
    monkeypatch.setattr(torch_file, "MAX_OBJECTS", size - 1)
    with pytest.raises(CheckpointError, match="overlong"):
        torch_file.read_tensors(saved / BIN)


def _cached(hub: Path, adapter: Path, *, name: str = "owner--name", files: tuple[str, ...]) -> Path:
    """The hub's cache as its client lays it out; the snapshot's directory."""
    repository = hub / f"models--{name}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, file in enumerate(files):
        shutil.copy(adapter / file, repository / "blobs" / f"{number:040}")
        (snapshot / file).symlink_to(f"../../blobs/{number:040}")
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_cached_repository_of_the_hub_is_read(saved: Path, hub: Path) -> None:
    snapshot = _cached(hub, saved, files=(CONFIG, TENSORS))
    experts = molora.load_experts({"a": "owner/name", "b": "owner/name@main", "c": snapshot})
    for adapter in experts.adapters.values():
        _assert_same(adapter, read_adapter(saved))
        assert adapter.source == snapshot
    assert {note.split(":")[0] for note in experts.notes} == {"a, b", "a, c"}


def test_of_the_hub_too_other_files_are_asked_for(saved: Path, hub: Path) -> None:
    _cached(hub, saved, files=(CONFIG, BIN))
    with pytest.raises(CheckpointError, match="cannot be had"):
        molora.load_experts({"a": "owner/name"})
    found = molora.load_experts({"a": "owner/name"}, allow_pickle=True).adapters["a"]
    _assert_same(found, read_adapter(saved))


@pytest.mark.parametrize("place", ["owner/name", "owner/name@v1", "o-1/n.x_y@refs/pr/1"])
def test_what_the_hub_does_not_have_is_named(hub: Path, place: str) -> None:
    with pytest.raises(CheckpointError, match=r"owner/name|o-1/n\.x_y"):
        molora.load_experts({"a": place})


@pytest.mark.parametrize(
    "place", ["name", "/nowhere/at/all", "a/b/c", "../a", "a/..", "a/b@../c", "", "a/b@", "-a/b"]
)
def test_what_is_no_id_is_no_directory(hub: Path, place: str) -> None:
    with pytest.raises(CheckpointError):
        molora.load_experts({"a": place})


def test_a_directory_goes_before_an_id(
    saved: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    saved.rename(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    adapter = molora.load_experts({"a": "owner/name"}).adapters["a"]
    assert adapter.source == Path("owner/name")


def _to_another_repository(snapshot: Path, tensors: Path) -> None:
    other = snapshot.parents[2] / "models--x" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(tensors, other / "0")
    (snapshot / TENSORS).symlink_to(other / "0")


def _blobs_elsewhere(snapshot: Path, tensors: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    shutil.copy(tensors, blobs / "0")
    blobs.rename(snapshot.parents[2] / "elsewhere")
    blobs.symlink_to("../elsewhere")
    (snapshot / TENSORS).symlink_to("../../blobs/0")


def _within_blobs(snapshot: Path, tensors: Path) -> None:
    (snapshot.parents[1] / "blobs" / "x").mkdir()
    shutil.copy(tensors, snapshot.parents[1] / "blobs" / "x" / "0")
    (snapshot / TENSORS).symlink_to("../../blobs/x/0")


def _circle(snapshot: Path, tensors: Path) -> None:
    (snapshot / TENSORS).symlink_to(TENSORS)


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "a file elsewhere": lambda snapshot, tensors: (snapshot / TENSORS).symlink_to(tensors),
    "another repository": _to_another_repository,
    "a link for blobs": _blobs_elsewhere,
    "within blobs": _within_blobs,
    "nothing": lambda snapshot, tensors: (snapshot / TENSORS).symlink_to("../../blobs/none"),
    "a folder": lambda snapshot, tensors: (snapshot / TENSORS).symlink_to("../../blobs"),
    "a circle": _circle,
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_of_the_cache_lead_to_its_own_blobs_only(saved: Path, hub: Path, kind: str) -> None:
    snapshot = _cached(hub, saved, files=(CONFIG,))
    LINKS[kind](snapshot, saved / TENSORS)
    with pytest.raises(CheckpointError, match=r"is a link and could lead anywhere"):
        read_adapter(snapshot)
    (snapshot / TENSORS).unlink()
    shutil.copy(saved / TENSORS, snapshot / TENSORS)
    if kind != "a link for blobs":  # there the settings are behind the same link
        assert read_adapter(snapshot).modules


def test_a_directory_of_adapters_is_a_set(tmp_path: Path) -> None:
    for name in ("10", "b", "9", "a-b"):
        save_adapter(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("no adapter")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert molora.load_experts(tmp_path).names == ("9", "10", "a-b", "b")
    assert molora.load_experts(str(tmp_path)).names == ("9", "10", "a-b", "b")
    (tmp_path / "b" / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"has no {TENSORS}"):
        molora.load_experts(tmp_path)
    with pytest.raises(CheckpointError, match="No sub-directory of"):
        molora.load_experts(tmp_path / "notes")
    with pytest.raises(CheckpointError, match="no directory of adapters"):
        molora.load_experts(tmp_path / "none")


def test_initial_factors_are_of_experts_that_there_are(saved: Path) -> None:
    with pytest.raises(ConfigError, match="initial names b, which are no experts"):
        molora.load_experts({"a": saved}, initial={"b": saved})


def test_types_are_checked_here_too(saved: Path) -> None:
    tensors: dict[str, Tensor] = torch.load(saved / BIN, weights_only=True)
    (saved / TENSORS).unlink()
    torch.save({name: x.double() for name, x in tensors.items()}, saved / BIN)
    with pytest.raises(CheckpointError, match="float64"):
        read_adapter(saved, allow_pickle=True)

"""A training checkpoint gives back, bit for bit, what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from saved_checkpoints import (
    ALL,
    is_exact,
    random_tensor,
    same_bits,
    save_checkpoint,
    trainer_tensors,
)

import molora
from molora import io


def write(directory: Path, **changes: Any) -> None:
    """A checkpoint without a mixture."""
    values = {"step": 1, "world_size": 1, "stage": None, "tensors": {}, "state": {}, "files": []}
    io.write_checkpoint(directory, **{**values, **changes})


def tensors_path(directory: Path) -> Path:
    return next(directory.glob("trainer-*.safetensors"))


def test_a_checkpoint_reads_back_exactly(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path, 7)
    found = io.read_checkpoint(directory)
    assert (found.directory, found.step, found.world_size, found.stage) == (directory, 7, 2, 3)
    assert is_exact(found)
    assert not same_bits(found.tensors(), trainer_tensors(8))  # negative controls
    assert not is_exact(io.Checkpoint(**{**vars(found), "step": 8}))


def test_the_manifest_names_every_other_file_and_nothing_of_where_it_lies(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path, 7)
    text = (directory / "checkpoint.json").read_text()
    manifest = json.loads(text)
    assert {**manifest["files"]} == {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in directory.iterdir()
        if path.name != "checkpoint.json"
    }
    assert len(manifest["files"]) == 4
    assert {
        name: value for name, value in manifest.items() if name not in ("files", "checksum")
    } == {
        "format_version": 1,
        "molora_version": molora.__version__,
        "step": 7,
        "world_size": 2,
        "stage": 3,
    }
    assert str(tmp_path) not in text
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}


def test_safetensors_itself_reads_the_same_tensors(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path, 7)
    assert same_bits(load_file(tensors_path(directory)), trainer_tensors(7))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", ALL)
def test_every_dtype_and_shape(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"value": random_tensor(dtype, shape), "after": torch.tensor(1.5)}
    write(tmp_path / "c", tensors=tensors)
    assert same_bits(io.read_checkpoint(tmp_path / "c").tensors(), tensors)


def test_non_finite_and_negative_zero_values_are_kept(tmp_path: Path) -> None:
    """Moments are data; a mixture with such values is refused."""
    tensors = {"value": torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])}
    write(tmp_path / "c", tensors=tensors)
    read = io.read_checkpoint(tmp_path / "c").tensors()
    assert same_bits(read, tensors)
    assert not same_bits(read, {"value": tensors["value"].abs()})


@given(
    names=st.lists(st.text(max_size=8), max_size=5, unique=True),
    data=st.data(),
)
def test_any_names_and_shapes_read_back_or_are_refused_by_name(
    names: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    tensors = {
        name: random_tensor(
            data.draw(st.sampled_from(ALL)), data.draw(shapes), seed=data.draw(st.integers(0, 99))
        )
        for name in names
    }
    directory = tmp_path_factory.mktemp("names") / "c"
    odd = [name for name in names if not name.isprintable()]
    if odd:
        with pytest.raises(molora.CheckpointError, match="cannot be called") as refusal:
            write(directory, tensors=tensors)
        assert any(f"{name!a}" in str(refusal.value) for name in odd)
        assert not directory.exists()
    else:
        write(directory, tensors=tensors)
        assert same_bits(io.read_checkpoint(directory).tensors(), tensors)
    shutil.rmtree(directory.parent)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(state=st.dictionaries(st.text(), JSON, max_size=4))
def test_any_json_reads_back(
    state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("state") / "c"
    write(directory, state=state)
    assert io.read_checkpoint(directory).state == state
    shutil.rmtree(directory.parent)


def test_numbers_that_are_none_in_the_state_are_kept(tmp_path: Path) -> None:
    """A logged loss may be NaN, and a best metric that nobody reached is infinite."""
    write(tmp_path, state={"loss": float("nan"), "best": float("-inf")})
    state = io.read_checkpoint(tmp_path).state
    assert state["loss"] != state["loss"]
    assert state["best"] == float("-inf")


def test_strided_tensors_and_parameters_are_stored_by_value(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(whole[:2].clone())
    write(tmp_path, tensors={"mT": whole.mT, "slice": whole[1:, ::2], "parameter": parameter})
    read = io.read_checkpoint(tmp_path).tensors()
    assert same_bits(
        read, {"mT": whole.mT, "slice": whole[1:, ::2], "parameter": parameter.detach()}
    )
    assert not read["parameter"].requires_grad


def test_what_is_done_to_read_tensors_does_not_reach_the_file(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path, 7)
    for tensor in io.read_checkpoint(directory).tensors().values():
        tensor.zero_()
    assert is_exact(io.read_checkpoint(directory))


def test_read_tensors_outlive_their_directory(tmp_path: Path) -> None:
    """Rotation may delete the checkpoint that a run was resumed from."""
    tensors = io.read_checkpoint(save_checkpoint(tmp_path, 7)).tensors()
    shutil.rmtree(tmp_path / "checkpoint-7")
    assert same_bits(tensors, trainer_tensors(7))


def test_the_same_content_gives_the_same_files(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path / "a", 7)
    second = save_checkpoint(tmp_path / "b", 7)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in second.iterdir()
    }
    backwards = dict(reversed(trainer_tensors(7).items()))
    write(tmp_path / "c", tensors=backwards)
    assert tensors_path(tmp_path / "c").name == tensors_path(first).name


@pytest.mark.parametrize("how", ["moved", "copied", "linked", "relative"])
def test_a_directory_elsewhere_reads(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_checkpoint(tmp_path / "out", 7)
    target = tmp_path / "elsewhere" / "checkpoint-7"
    target.parent.mkdir()
    if how == "moved":
        directory.rename(target)
    elif how == "copied":
        shutil.copytree(directory, target)
    elif how == "linked":
        target.symlink_to(directory)
    else:
        monkeypatch.chdir(directory)
        target = Path()
    assert is_exact(io.read_checkpoint(target))
    if how in ("moved", "copied"):
        found, _ = io.newest_complete(target.parent)
        assert found is not None
        assert is_exact(found)


def test_files_are_readable_by_others_as_usual(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        directory = save_checkpoint(tmp_path, 7)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o644}


def _nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def _circle() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["a"] = value
    return value


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "complex": ({"tensors": {"c": torch.zeros(2, dtype=torch.complex64)}}, "c is torch.complex64"),
    "meta": ({"tensors": {"m": torch.zeros(2, device="meta")}}, "m is on meta"),
    "sparse": ({"tensors": {"s": torch.eye(3).to_sparse()}}, "s is on cpu with layout"),
    "metadata": ({"tensors": {"__metadata__": torch.zeros(2)}}, "cannot be called '__metadata__'"),
    "line in a name": ({"tensors": {"a\n": torch.zeros(2)}}, r"cannot be called 'a\\n'"),
    "state with a tensor": ({"state": {"a": torch.zeros(2)}}, "state is no JSON: .*Tensor"),
    "state too deep": ({"state": _nested(100_000)}, "state is no JSON: "),
    "state in a circle": ({"state": _circle()}, "state is no JSON: Circular"),
    "state too large": ({"state": {"a": "x" * 2**27}}, "bytes as JSON; 134217728 are the most"),
    "missing file": ({"files": ["molora.json"]}, "has no molora.json"),
    "path": ({"files": ["../molora.json"]}, "'../molora.json' cannot be a file"),
    "absolute path": ({"files": ["/etc/passwd"]}, "'/etc/passwd' cannot be a file"),
    "own name": ({"files": ["trainer_state.json"]}, "'trainer_state.json' cannot be"),
    "manifest": ({"files": ["checkpoint.json"]}, "'checkpoint.json' cannot be"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(molora.CheckpointError, match=message):
        write(tmp_path / "c", **changes)
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"step": -1}, {"world_size": 0}, {"stage": 4}], ids=lambda changes: str(changes)
)
def test_numbers_that_cannot_be_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(molora.ConfigError, match=next(iter(changes))):
        write(tmp_path / "c", **changes)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_link_among_the_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "c" / "notes").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(molora.CheckpointError, match="notes is a link"):
        write(tmp_path / "c", files=["notes"])

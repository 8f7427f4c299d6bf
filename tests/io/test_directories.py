"""What may lie in a directory, and where links may lead."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from saved_mixtures import MANIFEST, edit_manifest, logits, save_tiny, tensors_path
from tiny_models import randomize, tiny
from torch import nn

import molora


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over_an_older_save"])
@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", ".hidden", "molora-.json"])
def test_saving_leaves_other_files_alone(existing: bool, name: str, tmp_path: Path) -> None:
    mixture = save_tiny(tmp_path / "mixture")
    directory = tmp_path / ("mixture" if existing else "other")
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("mine")
    randomize(mixture, std=0.5, seed=7)
    mixture.save(directory)
    assert (directory / name).read_text() == "mine"
    assert len(list(directory.iterdir())) == 3
    want = {key: value.clone() for key, value in mixture.state_dict().items()}
    mixture.detach()
    loaded = molora.load(mixture.model, directory).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in want.items())


def test_a_link_or_directory_in_the_manifests_place_is_refused(tmp_path: Path) -> None:
    mixture = save_tiny(tmp_path / "mixture")
    (tmp_path / "odd" / MANIFEST).mkdir(parents=True)
    with pytest.raises(molora.CheckpointError, match=MANIFEST):
        mixture.save(tmp_path / "odd")
    (tmp_path / "linked").mkdir()
    (tmp_path / "target.json").write_text("mine")
    (tmp_path / "linked" / MANIFEST).symlink_to(tmp_path / "target.json")
    with pytest.raises(molora.CheckpointError, match="is a link"):
        mixture.save(tmp_path / "linked")
    assert (tmp_path / "target.json").read_text() == "mine"


def test_saving_onto_a_file_is_refused(tmp_path: Path) -> None:
    mixture = save_tiny(tmp_path / "mixture")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(molora.CheckpointError, match="is not a directory"):
        mixture.save(tmp_path / "file")
    with pytest.raises(molora.CheckpointError, match="could not be written"):
        mixture.save(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_makes_missing_parents_and_readable_files(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        save_tiny(tmp_path / "a" / "b" / "mixture")
    finally:
        os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "a" / "b" / "mixture").iterdir()}
    assert modes == {0o644}


def test_loading_passes_over_other_files(saved: Path, base: nn.Module) -> None:
    (saved / "README.md").write_text("about this mixture")
    (saved / "model.safetensors").write_bytes(b"none of ours")
    (saved / "molora-0123456789abcdef.safetensors").write_bytes(b"from a save that was killed")
    (saved / ".molora.00.partial").write_bytes(b"from another")
    plain = logits(base)
    molora.load(base, saved)
    assert (logits(base) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("which", ["manifest", "tensors"])
def test_a_linked_file_is_not_loaded_and_what_it_leads_to_stays(
    which: str, saved: Path, base: nn.Module, tmp_path: Path
) -> None:
    """The link leads to the very file, so that nothing but the link is wrong."""
    path = saved / MANIFEST if which == "manifest" else tensors_path(saved)
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    content = elsewhere.read_bytes()
    with pytest.raises(molora.CheckpointError, match=f"{path.name} is a link"):
        molora.load(base, saved)
    mixture = molora.attach(base, molora.presets.lora(rank=2))
    if which == "manifest":
        with pytest.raises(molora.CheckpointError, match=f"{path.name} is a link"):
            mixture.save(saved)
    else:
        mixture.save(saved)
        assert not path.is_symlink()
    assert elsewhere.read_bytes() == content


@pytest.mark.parametrize("which", ["manifest", "tensors"])
def test_a_file_that_is_no_file_is_refused(which: str, saved: Path, base: nn.Module) -> None:
    path = saved / MANIFEST if which == "manifest" else tensors_path(saved)
    path.unlink()
    with pytest.raises(molora.CheckpointError, match=f"has no {path.name}"):
        molora.load(base, saved)
    os.mkfifo(path)  # opening one would wait forever
    with pytest.raises(molora.CheckpointError, match=f"has no {path.name}"):
        molora.load(base, saved)


def test_a_linked_directory_is_the_directory(saved: Path, base: nn.Module, tmp_path: Path) -> None:
    """Who names a link chose where it leads."""
    link = tmp_path / "link"
    link.symlink_to(saved, target_is_directory=True)
    mixture = molora.load(base, link)
    randomize(mixture, seed=5)
    expected = logits(base)
    mixture.save(link)
    assert link.is_symlink()
    again = tiny("llama")
    molora.load(again, saved)
    assert torch.equal(logits(again), expected)


def test_no_directory_and_no_mixture_are_said_plainly(base: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(molora.CheckpointError, match="is not a directory with a saved mixture"):
        molora.load(base, tmp_path / "missing")
    with pytest.raises(molora.CheckpointError, match=rf"has no {MANIFEST}"):
        molora.load(base, tmp_path)


@pytest.mark.parametrize("name", ["../mixture", "/etc/passwd", "..", "a/../../b"])
def test_names_in_the_manifest_open_no_file(name: str, saved: Path, base: nn.Module) -> None:
    def rename(data: dict[str, object]) -> None:
        data["sha256"] = name

    shutil.copytree(saved, saved.parent / "mixture.safetensors")
    edit_manifest(saved, rename)
    with pytest.raises(molora.CheckpointError, match="sha256: String should match"):
        molora.load(base, saved)


def test_saving_again_leaves_two_files(tmp_path: Path) -> None:
    mixture = save_tiny(tmp_path / "mixture")
    first = sorted(path.name for path in (tmp_path / "mixture").iterdir())
    mixture.save(tmp_path / "mixture")
    assert sorted(path.name for path in (tmp_path / "mixture").iterdir()) == first
    randomize(mixture, seed=3)
    mixture.save(tmp_path / "mixture")
    second = sorted(path.name for path in (tmp_path / "mixture").iterdir())
    assert len(second) == 2
    assert second != first

"""Mixtures of the hub: two files of a repository, in the cache as its client lays it out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny_models import randomize, tiny

import molora
from molora.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cached repository owner/name with a mixture."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    mixture = molora.attach(tiny("llama"), molora.presets.mola(num_experts=3, rank=2))
    randomize(mixture)
    mixture.save(tmp_path / "saved")
    repository = tmp_path / "hub" / "models--owner--name"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    found = repository / "snapshots" / COMMIT
    for number, file in enumerate(sorted((tmp_path / "saved").iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (found / file.name).symlink_to(f"../../blobs/{number}")
    return found


@pytest.mark.parametrize("place", ["owner/name", "owner/name@main", "snapshot"])
def test_a_mixture_of_the_hub_is_loaded(place: str, snapshot: Path, tmp_path: Path) -> None:
    found = molora.load(tiny("llama"), snapshot if place == "snapshot" else place)
    saved = molora.load(tiny("llama"), tmp_path / "saved")
    state = saved.state_dict()
    assert state.keys() == found.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())


def test_a_file_that_the_hub_lacks_is_named(snapshot: Path) -> None:
    next(snapshot.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"owner/name is not a directory here.*molora\.json"):
        molora.load(tiny("llama"), "owner/name")


def test_links_to_other_places_are_not_followed(snapshot: Path, tmp_path: Path) -> None:
    file = next(snapshot.glob("*.safetensors"))
    file.unlink()
    file.symlink_to(next((tmp_path / "saved").glob("*.safetensors")))
    model = tiny("llama")
    with pytest.raises(CheckpointError, match="is a link and could lead anywhere"):
        molora.load(model, snapshot)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_what_is_no_id_is_no_directory() -> None:
    with pytest.raises(CheckpointError, match="is not a directory, and no id of the hub"):
        molora.load(tiny("llama"), "nowhere")

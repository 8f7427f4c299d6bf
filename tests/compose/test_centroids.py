"""Centroids: means of embeddings, stored sealed, compared only by the encoder that made them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_encoders import reference, save_encoder
from torch.nn.functional import cosine_similarity

from molora.compose.centroids import Centroids, build_centroids, load_centroids
from molora.compose.encoder import TextEncoder
from molora.errors import CheckpointError, ConfigError, DataError, MoLoRAError

SAMPLES = {
    "math": ["1 + 1 = 2", "7 * 8 = 56", "9 - 4"],
    "code": ["def f(x):", "return x"],
    "law-1": ["the court held"],
}
TEXTS = ["2 + 3 = 5", "def g(y):", "the court", "something else"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def encoder(directory: Path) -> TextEncoder:
    return TextEncoder.load(directory)


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    directory = tmp_path_factory.mktemp("encoders") / "other"
    return TextEncoder.load(save_encoder(directory, seed=1))


@pytest.fixture(scope="module")
def stored_centroids(
    encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...], torch.Tensor]:
    directory = tmp_path_factory.mktemp("stored")
    made = build_centroids(encoder, SAMPLES)
    made.save(directory)
    return directory, made.names, made.vectors_ED


@pytest.fixture
def centroids(encoder: TextEncoder) -> Centroids:
    return build_centroids(encoder, SAMPLES, instruction="task: ")


def test_a_centroid_is_the_mean_of_the_embeddings_with_the_instruction(directory, centroids):
    assert (centroids.names, centroids.samples) == (tuple(SAMPLES), (3, 2, 1))
    for row, texts in zip(centroids.vectors_ED, SAMPLES.values(), strict=True):
        wanted = reference(directory, ["task: " + text for text in texts]).mean(dim=0)
        torch.testing.assert_close(row, wanted, atol=1e-6, rtol=0)
        bare = reference(directory, texts).mean(dim=0)
        assert (row - bare).abs().max() > 1e-2


def test_cosines_are_those_of_text_with_instruction_and_centroid(directory, encoder, centroids):
    found = centroids.cosines(encoder, TEXTS)
    texts = reference(directory, ["task: " + text for text in TEXTS])
    wanted = cosine_similarity(texts[:, None], centroids.vectors_ED[None], dim=-1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert found.shape == (4, 3)
    # a mean of several unit vectors is shorter than 1: a dot product would be something else
    assert (texts @ centroids.vectors_ED.T - found)[:, 0].abs().min() > 1e-4
    assert float(centroids.cosines(encoder, ["the court held"])[0, 2]) == pytest.approx(1, abs=1e-5)


def test_centroids_come_back_as_they_were(centroids, tmp_path):
    centroids.save(tmp_path / "new" / "place")
    found = load_centroids(tmp_path / "new" / "place")
    assert torch.equal(found.vectors_ED, centroids.vectors_ED)
    for name in ("names", "samples", "instruction", "encoder"):
        assert getattr(found, name) == getattr(centroids, name)


def test_saving_again_replaces_and_leaves_other_files(centroids, tmp_path):
    (tmp_path / "molora.json").write_text("of the mixture")
    centroids.save(tmp_path)
    held = load_centroids(tmp_path)
    centroids.ordered(["code", "math"]).save(tmp_path)
    assert load_centroids(tmp_path).names == ("code", "math")
    assert len(list(tmp_path.glob("centroids-*.safetensors"))) == 1
    assert (tmp_path / "molora.json").read_text() == "of the mixture"
    assert torch.equal(held.vectors_ED, centroids.vectors_ED)


def test_what_was_read_stays_when_its_file_is_written_to(centroids, tmp_path):
    centroids.save(tmp_path)
    found = load_centroids(tmp_path)
    with next(tmp_path.glob("*.safetensors")).open("r+b") as file:
        file.seek(-40, 2)
        file.write(b"\0" * 40)
    assert torch.equal(found.vectors_ED, centroids.vectors_ED)


def test_order_is_the_callers(centroids):
    found = centroids.ordered(["law-1", "math"])
    assert (found.names, found.samples) == (("law-1", "math"), (1, 3))
    assert torch.equal(found.vectors_ED, centroids.vectors_ED[[2, 0]])
    with pytest.raises(ConfigError, match=r"unknown expert 'maths'\. Close names: math\..*samples"):
        centroids.ordered(["maths"])
    with pytest.raises(ConfigError, match="'math' is there twice"):
        centroids.ordered(["math", "math"])


def test_experts_are_added(encoder, other_encoder, centroids):
    more = {"news": ["today in the city"]}
    both = centroids.joined(build_centroids(encoder, more, instruction="task: "))
    together = build_centroids(encoder, {**SAMPLES, **more}, instruction="task: ")
    assert (both.names, both.samples) == (together.names, together.samples)
    torch.testing.assert_close(both.vectors_ED, together.vectors_ED, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="'math' is there twice"):
        centroids.joined(centroids)
    with pytest.raises(ConfigError, match="with the instruction 'task: ' and with ''"):
        centroids.joined(build_centroids(encoder, more))
    with pytest.raises(ConfigError, match="made with the encoder"):
        centroids.joined(build_centroids(other_encoder, more, instruction="task: "))


def test_another_encoder_is_refused(other_encoder, centroids):
    with pytest.raises(ConfigError, match=r"made with the encoder .*tiny.* but .*other.* was"):
        centroids.cosines(other_encoder, TEXTS)


def test_an_encoder_is_known_by_its_files_and_not_by_its_name(directory, centroids, tmp_path):
    moved = TextEncoder.load(shutil.copytree(directory, tmp_path / "moved"))
    assert moved.identity.name != centroids.encoder.name
    assert centroids.cosines(moved, TEXTS).shape == (4, 3)
    place = tmp_path / directory.parent.name / directory.name
    namesake = TextEncoder.load(save_encoder(place, seed=1))
    assert namesake.identity.name == centroids.encoder.name
    with pytest.raises(ConfigError, match="made with the encoder"):
        centroids.cosines(namesake, TEXTS)


class Opposed:
    """Two texts that cancel out."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.identity = encoder.identity

    def encode(self, texts: list[str], *, keep: str = "start") -> torch.Tensor:
        return torch.tensor([[1.0, 0.0], [-1.0, 0.0]])


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ({}, ConfigError, "0 experts were given"),
        ({"../math": ["a"]}, ConfigError, r"An expert cannot be called '\.\./math'"),
        ({"math": []}, DataError, "'math' has no list of texts"),
        ({"math": "text"}, DataError, "'math' has no list of texts"),
    ],
)
def test_samples_that_make_no_centroid_are_refused(encoder, samples, error, message):
    with pytest.raises(error, match=message):
        build_centroids(encoder, samples)


def test_texts_that_cancel_out_are_refused(encoder):
    with pytest.raises(DataError, match="the texts of 'math' point everywhere"):
        build_centroids(Opposed(encoder), {"math": ["a", "b"]})


# ---- damage ----


def edit_json(directory: Path, edit: Callable[[dict[str, Any]], None], *, sealed: bool) -> None:
    path = directory / "centroids.json"
    data = json.loads(path.read_text())
    edit(data)
    if sealed:
        data.pop("checksum")
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        data["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(data))


def _rename(data: dict[str, Any]) -> None:
    data["names"][0] = "maths"


def _drop(data: dict[str, Any]) -> None:
    data["names"].pop()


def _drop_both(data: dict[str, Any]) -> None:
    data["names"].pop()
    data["samples"].pop()


def _twice(data: dict[str, Any]) -> None:
    data["names"][0] = data["names"][1]


def _path(data: dict[str, Any]) -> None:
    data["names"][0] = "../math"


def _newer(data: dict[str, Any]) -> None:
    data["format_version"] = 2


def _more(data: dict[str, Any]) -> None:
    data["surprise"] = 1


def _dimension(data: dict[str, Any]) -> None:
    data["encoder"]["dimension"] = 31


def _huge(data: dict[str, Any]) -> None:
    data["encoder"]["dimension"] = 10**12
    data["file"]["tensors"]["vectors"]["shape"] = [3, 10**12]


def _half(data: dict[str, Any]) -> None:
    data["file"]["tensors"]["vectors"]["dtype"] = "bfloat16"


def _digest(data: dict[str, Any]) -> None:
    data["file"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop, "names 2 experts and counts the samples of 3"),
        (_drop_both, "lists tensors"),
        (_twice, "'code' is there twice"),
        (_path, "cannot be called"),
        (_newer, "format version 2; this molora reads up to 1"),
        (_more, "unknown key 'surprise'"),
        (_dimension, "lists tensors"),
        (_huge, "has other tensors than"),
        (_half, "lists tensors"),
        (_digest, "has no centroids-0000000000000000.safetensors"),
    ],
)
def test_a_description_that_cannot_be_is_refused(centroids, tmp_path, edit, message):
    centroids.save(tmp_path)
    edit_json(tmp_path, edit, sealed=True)
    with pytest.raises(CheckpointError, match=message):
        load_centroids(tmp_path)


def test_a_changed_value_is_noticed(centroids, tmp_path):
    centroids.save(tmp_path)
    edit_json(tmp_path, _rename, sealed=False)
    with pytest.raises(CheckpointError, match="does not have the checksum that it states"):
        load_centroids(tmp_path)
    edit_json(tmp_path, _rename, sealed=True)  # renamed twice, and sealed: not noticed
    assert load_centroids(tmp_path).names[0] == "maths"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _add(path: Path) -> None:
    tensors = load_file(path)
    save_file({**tensors, "more": torch.ones(1)}, path)


def _link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "does not have the SHA-256"),
        (_cut, "truncated or damaged"),
        (_add, "has other tensors than"),
        (_link, "is a link"),
        (Path.unlink, "has no centroids-"),
    ],
)
def test_a_damaged_file_is_refused(centroids, tmp_path, damage, message):
    centroids.save(tmp_path)
    damage(next(tmp_path.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=message):
        load_centroids(tmp_path)


def test_a_directory_without_centroids_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no centroids\.json"):
        load_centroids(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_centroids(tmp_path / "nothing")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_saved(centroids, tmp_path, value):
    centroids.vectors_ED[1, 2] = value
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        centroids.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fails_leaves_what_was_there(centroids, tmp_path, monkeypatch):
    centroids.save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("molora.io.atomic.os.replace", full)
    with pytest.raises(CheckpointError, match="could not be written: disk full"):
        centroids.ordered(["code"]).save(tmp_path)
    with pytest.raises(CheckpointError, match="could not be written: disk full"):
        centroids.save(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_link_in_the_place_of_the_description_is_not_written_through(centroids, tmp_path):
    target = tmp_path / "target.json"
    target.write_text("mine")
    (tmp_path / "centroids.json").symlink_to(target)
    with pytest.raises(CheckpointError, match="is a link or a directory"):
        centroids.save(tmp_path)
    assert target.read_text() == "mine"


@given(data=st.data())
def test_damaged_bytes_load_as_they_were_or_not_at_all(stored_centroids, data):
    directory, names, vectors_ED = stored_centroids
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(directory, Path(folder) / "copy"))
        path = data.draw(st.sampled_from(sorted(copy.iterdir())))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(content)))
            end = data.draw(st.integers(start, min(len(content), start + 30)))
            content[start:end] = data.draw(st.binary(max_size=12) | st.just(b"9" * 5000))
        path.write_bytes(content)
        try:
            found = load_centroids(copy)
        except MoLoRAError:
            return
        # blanks of the JSON, or nothing
        assert found.names == names
        assert torch.equal(found.vectors_ED, vectors_ED)

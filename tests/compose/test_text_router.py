"""Text routers beside their mixtures: saved, read with the right encoder, and no other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import chat_model, chat_tokenizer
from peft_adapters import save_adapter
from tiny_encoders import save_encoder
from transformers import StoppingCriteriaList

import molora
from molora.compose.centroids import build_centroids
from molora.compose.classifier import TopKClasses, train_classifier
from molora.compose.encoder import TextEncoder
from molora.compose.generation import gates_by_text
from molora.compose.retrieval import Retriever, SoftmaxWeights
from molora.compose.text_router import (
    MANIFEST,
    TextRouter,
    copy_text_router,
    has_text_router,
    load_text_router,
    read_text_router,
)
from molora.errors import AttachError, CheckpointError, ConfigError, MoLoRAError
from molora.generate import Loaded, generate_texts
from molora.io import sealed

SAMPLES = {
    "math": ["1 + 1 = 2", "7 * 8 = 56", "9 - 4"],
    "code": ["def f(x):", "return x"],
    "law": ["the court held", "the judge said"],
}
NAMES = tuple(SAMPLES)
TEXTS = ["2 + 3 = 5", "def g(y):", "the court of a longer text that is cut", "something else"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def encoder(directory: Path) -> TextEncoder:
    return TextEncoder.load(directory)


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder.load(save_encoder(tmp_path_factory.mktemp("encoders") / "tiny", seed=1))


@pytest.fixture(scope="module")
def routers(encoder: TextEncoder) -> dict[str, TextRouter]:
    weights = SoftmaxWeights(temperature=0.02, k=2)
    texts = [text for texts in SAMPLES.values() for text in texts]
    labels = [name for name, texts in SAMPLES.items() for _ in texts]
    select = TopKClasses(k=2, weights="renormalized")
    return {
        "retriever": TextRouter(
            Retriever(encoder, build_centroids(encoder, SAMPLES, instruction="Q: "), weights, "end")
        ),
        "classifier": TextRouter(
            train_classifier(encoder, texts, labels, names=NAMES, select=select, keep="start"), 2
        ),
    }


KINDS = pytest.mark.parametrize("kind", ["retriever", "classifier"])


@KINDS
def test_a_text_router_comes_back_as_it_was(
    kind: str, routers: dict[str, TextRouter], encoder: TextEncoder, tmp_path: Path
) -> None:
    router = routers[kind]
    assert not has_text_router(tmp_path)
    router.save(tmp_path / "a")
    assert has_text_router(tmp_path / "a")
    found = load_text_router(tmp_path / "a", encoder)
    assert (found.names, found.every) == (NAMES, router.every)
    assert torch.equal(found.gates(TEXTS), router.gates(TEXTS))
    # weights, selection and the part that is kept are those that were saved
    for key in ("weights", "select", "keep"):
        assert getattr(found.decides, key, None) == getattr(router.decides, key, None)
    found.save(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    assert not torch.equal(routers["retriever"].gates(TEXTS), routers["classifier"].gates(TEXTS))


@KINDS
def test_the_order_is_the_mixtures(kind: str, routers: dict[str, TextRouter]) -> None:
    router = routers[kind]
    expected = router.gates(TEXTS)
    turned = router.ordered(["law", "math", "code"])
    assert (turned.names, turned.every) == (("law", "math", "code"), router.every)
    torch.testing.assert_close(turned.gates(TEXTS), expected[:, [2, 0, 1]])
    assert not torch.allclose(turned.gates(TEXTS), expected)
    fewer = router.ordered(["law", "math"]).gates(TEXTS)
    torch.testing.assert_close(fewer.sum(dim=-1), torch.ones(len(TEXTS)))
    with pytest.raises(ConfigError, match="unknown expert 'news'"):
        router.ordered(["law", "news"])


@KINDS
def test_another_encoder_is_refused(
    kind: str,
    routers: dict[str, TextRouter],
    other_encoder: TextEncoder,
    directory: Path,
    tmp_path: Path,
) -> None:
    routers[kind].save(tmp_path)
    with pytest.raises(ConfigError, match="made with the encoder"):
        load_text_router(tmp_path, other_encoder)
    moved = directory.rename(directory.with_name("moved"))
    try:  # a name is not what identifies it
        again = load_text_router(tmp_path, TextEncoder.load(moved))
        assert torch.equal(again.gates(TEXTS), routers[kind].gates(TEXTS))
    finally:
        moved.rename(directory)


def test_gates_are_renewed_after_a_token_or_more(routers: dict[str, TextRouter]) -> None:
    with pytest.raises(ConfigError, match="every=0"):
        TextRouter(routers["retriever"].decides, 0)


def test_generation_reads_the_saved_gates(
    routers: dict[str, TextRouter], encoder: TextEncoder, tmp_path: Path
) -> None:
    order = ("code", "law", "math")
    for seed, name in enumerate(order):
        save_adapter(tmp_path / name, seed=seed + 1, target_modules=["q_proj", "down_proj"])
    model = chat_model().eval()
    experts = molora.load_experts({name: tmp_path / name for name in order})
    mixture = molora.compose(model, experts, router="given")
    routers["retriever"].save(tmp_path / "mixture")
    router = load_text_router(tmp_path / "mixture", encoder).ordered(order)
    prompt = ["def h(z):"]
    inputs = chat_tokenizer()(prompt, return_tensors="pt")
    with torch.no_grad():
        with gates_by_text(mixture, router.gates, prompt):
            found = model(**inputs).logits
        gates = routers["retriever"].gates(prompt)[:, [1, 2, 0]]
        expected = model(**inputs, expert_gates=gates).logits
        unordered = model(**inputs, expert_gates=routers["retriever"].gates(prompt)).logits
    torch.testing.assert_close(found, expected)
    assert (found - unordered).abs().max() > 1e-2


@KINDS
def test_prompts_of_unequal_length_generate_in_batches_as_alone(
    kind: str, routers: dict[str, TextRouter], tmp_path: Path
) -> None:
    for seed, name in enumerate(NAMES):
        save_adapter(tmp_path / name, seed=seed + 1, target_modules=["q_proj", "down_proj"])
    experts = molora.load_experts({name: tmp_path / name for name in NAMES})
    model = chat_model().eval()
    mixture = molora.compose(model, experts, router="given")
    loaded = Loaded(model, chat_tokenizer(), mixture)
    router = TextRouter(routers[kind].decides, 1)
    options = {"max_new_tokens": 5, "deciding": router.deciding(mixture, loaded.tokenizer)}
    texts = TEXTS[::-1]  # not by length, as batches are
    together = generate_texts(loaded, texts, batch_size=3, **options)
    assert together == [generate_texts(loaded, [text], **options)[0] for text in texts]
    # not as with the gates of one text for all
    with mixture.context(expert_gates=router.gates(texts[:1])):
        assert together != generate_texts(loaded, texts, batch_size=3, max_new_tokens=5)
    with pytest.raises(ConfigError, match="other experts than the mixture, or in another order"):
        router.ordered(["law", "math", "code"]).deciding(mixture, loaded.tokenizer)
    with pytest.raises(AttachError, match="gates come with the batch"):
        generate_texts(loaded, TEXTS[:1], max_new_tokens=5)


def test_of_a_conversation_every_message_is_read(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a")
    model, seen = chat_model().eval(), []
    mixture = molora.compose(model, molora.load_experts({"a": tmp_path / "a"}), router="uniform")

    def deciding(texts: Sequence[str]) -> AbstractContextManager[Any]:
        seen.append(list(texts))
        return nullcontext(StoppingCriteriaList())

    said = [("system", "Be brief."), ("user", "1 + 1"), ("assistant", "2"), ("user", "+ 1")]
    messages = [{"role": role, "content": content} for role, content in said]
    loaded = Loaded(model, chat_tokenizer(), mixture)
    generate_texts(loaded, [messages, "a text"], max_new_tokens=1, deciding=deciding)
    assert seen == [["a text", "Be brief.\n1 + 1\n2\n+ 1"]]


@KINDS
def test_a_copy_needs_no_encoder(kind: str, routers: dict[str, TextRouter], tmp_path: Path) -> None:
    routers[kind].save(tmp_path / "a")
    copy_text_router(tmp_path / "a", tmp_path / "b")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    )
    assert first == second
    assert len(first) == 3


def edited(directory: Path, *, reseal: bool, **values: object) -> None:
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    data |= values
    if reseal:
        del data["checksum"]
        data["checksum"] = sealed._checksum(data)
    path.write_text(json.dumps(data))


def without_part(directory: Path) -> None:
    (directory / "centroids.json").unlink()


def other_part(directory: Path) -> None:
    path = directory / "centroids.json"
    path.write_text(path.read_text() + "\n")


def linked(directory: Path) -> None:
    (directory / MANIFEST).rename(directory.parent / "elsewhere.json")
    (directory / MANIFEST).symlink_to(directory.parent / "elsewhere.json")


def flipped(directory: Path) -> None:
    path = next(directory.glob("centroids-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / MANIFEST).unlink(), "has no text_router.json"),
        (lambda d: (d / MANIFEST).write_text("{"), "not readable JSON"),
        (lambda d: edited(d, reseal=False, every=3), "checksum"),
        (lambda d: edited(d, reseal=True, every=0), "is damaged"),
        (lambda d: edited(d, reseal=True, decides={"kind": "oracle"}), "is damaged"),
        (lambda d: edited(d, reseal=True, names=["a", "../b"]), "is damaged"),
        (lambda d: edited(d, reseal=True, names=["code", "math", "law"]), "names other experts"),
        (lambda d: edited(d, reseal=True, decides={"kind": "classifier"}), "no classifier.json"),
        (lambda d: edited(d, reseal=True, format_version=2), "Upgrade molora"),
        (without_part, "has no centroids.json"),
        (other_part, "is not what text_router.json was saved with"),
        (linked, "is a link"),
        (flipped, "does not have the SHA-256"),
    ],
)
def test_a_damaged_text_router_is_refused(
    damage: Callable[[Path], object],
    message: str,
    routers: dict[str, TextRouter],
    encoder: TextEncoder,
    tmp_path: Path,
) -> None:
    place = tmp_path / "mixture"
    routers["retriever"].save(place)
    load_text_router(place, encoder)
    read_text_router(place)
    damage(place)
    for read in (lambda: load_text_router(place, encoder), lambda: read_text_router(place)):
        with pytest.raises(CheckpointError, match=message):
            read()


def test_another_encoders_name_in_the_description_is_noticed(
    routers: dict[str, TextRouter],
    encoder: TextEncoder,
    other_encoder: TextEncoder,
    tmp_path: Path,
) -> None:
    routers["retriever"].save(tmp_path)
    edited(tmp_path, reseal=True, encoder=other_encoder.identity.model_dump(mode="json"))
    with pytest.raises(CheckpointError, match="names other experts or another encoder"):
        load_text_router(tmp_path, encoder)


def test_saving_again_replaces_and_leaves_the_mixture(
    routers: dict[str, TextRouter], encoder: TextEncoder, tmp_path: Path
) -> None:
    (tmp_path / "molora.json").write_text("{}")
    routers["retriever"].save(tmp_path)
    routers["classifier"].save(tmp_path)
    assert read_text_router(tmp_path).decides.kind == "classifier"
    assert (tmp_path / "molora.json").read_text() == "{}"


def test_a_save_that_is_cut_off_is_noticed(
    routers: dict[str, TextRouter],
    encoder: TextEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routers["retriever"].save(tmp_path)
    whole, replace = load_text_router(tmp_path, encoder), os.replace

    def fail(source: Path, target: Path) -> None:
        if target.name == MANIFEST:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    other = TextRouter(Retriever(encoder, build_centroids(encoder, {**SAMPLES, "math": ["5 + 5"]})))
    with pytest.raises(CheckpointError, match="no space left"):
        other.save(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".molora.*"))
    with pytest.raises(CheckpointError, match="saving was cut off"):
        load_text_router(tmp_path, encoder)
    whole.save(tmp_path)
    assert torch.equal(load_text_router(tmp_path, encoder).gates(TEXTS), whole.gates(TEXTS))


def test_a_link_in_the_place_of_the_description_is_not_written_through(
    routers: dict[str, TextRouter], tmp_path: Path
) -> None:
    place, elsewhere = tmp_path / "mixture", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.write_text("mine")
    (place / MANIFEST).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a link or a directory"):
        routers["retriever"].save(place)
    assert elsewhere.read_text() == "mine"
    assert len(list(place.iterdir())) == 1


def test_changed_bytes_are_read_as_they_were_or_not_at_all(
    routers: dict[str, TextRouter], tmp_path: Path
) -> None:
    routers["classifier"].save(tmp_path)
    whole, path = read_text_router(tmp_path), tmp_path / MANIFEST
    data, refused = path.read_bytes(), 0
    for place in range(0, len(data), 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert read_text_router(tmp_path) == whole
        except MoLoRAError:
            refused += 1
    assert refused > len(data) / 10

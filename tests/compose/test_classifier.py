"""A classifier over embeddings: its formula in float64, its gates by hand, what it learns."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import POSITIONS, reference, save_encoder

from molora.compose.classifier import (
    Classes,
    TextClassifier,
    TopKClasses,
    TopPClasses,
    gates_from_probabilities,
    load_classifier,
    train_classifier,
)
from molora.compose.encoder import TextEncoder
from molora.errors import CheckpointError, ConfigError, DataError

NAMES = ["sums", "shouts", "words"]


def texts_of(start: int, count: int) -> tuple[list[str], list[str]]:
    """Three kinds of texts with their labels; different numbers, different texts."""
    rows = []
    for i in range(start, start + count):
        rows += [
            (f"{i} + {i * 7 % 10} = {i + i * 7 % 10}", "sums"),
            (f"{'ABCDEFGH'[i % 8]}HO{'Y' * (i % 5)} WHO{'OP' * (i % 3)}!", "shouts"),
            (f"the {'abcdefgh'[i % 8]}ot and {'on' * (1 + i % 4)}", "words"),
        ]
    return [text for text, _ in rows], [label for _, label in rows]


TRAIN, LABELS = texts_of(0, 12)
TEST, TEST_LABELS = texts_of(100, 12)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def encoder(directory: Path) -> TextEncoder:
    return TextEncoder.load(directory)


@pytest.fixture(scope="module")
def classifier(encoder: TextEncoder) -> TextClassifier:
    return train_classifier(encoder, TRAIN, LABELS, names=NAMES)


def test_it_learns_what_the_labels_say(encoder, classifier):
    assert classifier.accuracy(TRAIN, LABELS) == 1
    assert classifier.accuracy(TEST, TEST_LABELS) > 0.9
    turned = LABELS[1:] + LABELS[:1]
    assert classifier.accuracy(TRAIN, turned) == 0
    assert train_classifier(encoder, TRAIN, turned, names=NAMES).accuracy(TRAIN, turned) == 1


def test_probabilities_are_those_of_the_formula(directory, classifier):
    tensors = {name: tensor.double() for name, tensor in classifier.tensors.items()}
    x_ND = reference(directory, TEST).double()
    centred_ND = x_ND - x_ND.mean(dim=1, keepdim=True)
    normed_ND = centred_ND / ((centred_ND**2).mean(dim=1, keepdim=True) + 1e-5).sqrt()
    normed_ND = normed_ND * tensors["norm_weight"] + tensors["norm_bias"]
    exponents_NE = (normed_ND @ tensors["weight"].T + tensors["bias"]).exp()
    wanted = exponents_NE / exponents_NE.sum(dim=1, keepdim=True)
    found = classifier.probabilities(TEST)
    torch.testing.assert_close(found, wanted.float(), atol=1e-4, rtol=0)
    assert (tensors["norm_weight"] - 1).abs().max() > 1e-2  # the norm is learned too
    assert not found.requires_grad


def test_the_same_texts_give_the_same_bits_whatever_was_drawn(encoder, classifier):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    with torch.no_grad():
        again = train_classifier(encoder, TRAIN, LABELS, names=NAMES)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in classifier.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    fewer = train_classifier(encoder, TRAIN[:9], LABELS[:9], names=NAMES)
    assert not torch.equal(fewer.tensors["weight"], classifier.tensors["weight"])


def test_weight_decay_makes_it_less_sure(encoder, classifier):
    decayed = train_classifier(encoder, TRAIN, LABELS, names=NAMES, weight_decay=3.0)
    assert decayed.accuracy(TRAIN, LABELS) == 1
    sure, less = (c.probabilities(TRAIN).amax(dim=1).mean() for c in (classifier, decayed))
    assert less < sure - 0.01


PROBABILITIES = [0.5, 0.1, 0.3, 0.1]
E5, E3 = math.exp(0.5), math.exp(0.3)
CASES: dict[str, tuple[Classes, list[float]]] = {
    "the authors' top-p": (TopPClasses(), [E5 / (E5 + E3), 0, E3 / (E5 + E3), 0]),
    "top-p of one": (TopPClasses(p=0.4), [1, 0, 0, 0]),
    "top-p over the sum": (TopPClasses(weights="renormalized"), [5 / 8, 0, 3 / 8, 0]),
    "top-p of three": (TopPClasses(p=0.85, weights="renormalized"), [5 / 9, 1 / 9, 3 / 9, 0]),
    "the authors' top-k": (TopKClasses(), [5 / 8, 0, 3 / 8, 0]),
    "top-1": (TopKClasses(k=1, weights="double_softmax"), [1, 0, 0, 0]),
    "top-k of more than there are": (TopKClasses(k=9), PROBABILITIES),
    "top-2 twice softmax": (
        TopKClasses(weights="double_softmax"),
        [E5 / (E5 + E3), 0, E3 / (E5 + E3), 0],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gates_are_those_computed_by_hand(case):
    select, wanted = CASES[case]
    rows = torch.tensor([PROBABILITIES, [PROBABILITIES[i] for i in (2, 0, 1, 3)]])
    found = gates_from_probabilities(rows, select)
    turned = [wanted[i] for i in (2, 0, 1, 3)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, torch.tensor([wanted, turned], dtype=torch.float32), atol=1e-6, rtol=0
    )


def test_gates_of_texts_are_those_of_their_probabilities(classifier):
    assert classifier.select == TopPClasses(p=0.6, weights="double_softmax")
    found = classifier.gates(TEST)
    wanted = gates_from_probabilities(classifier.probabilities(TEST), TopPClasses())
    assert torch.equal(found, wanted)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(len(TEST)))
    assert torch.equal(found.argmax(dim=-1), torch.tensor([0, 1, 2] * 12))


def test_the_end_of_a_long_text_counts(encoder, classifier):
    long = "1 + 1 = 2 " * POSITIONS
    assert classifier.gates([long + "the lot and ononon go"]).argmax() == 2
    begun = ["1 + 1 = 2 " * POSITIONS + text for text in TRAIN]
    learned = train_classifier(encoder, begun, LABELS, names=NAMES)
    assert learned.accuracy(begun, LABELS) > 0.9
    blind = train_classifier(encoder, begun, LABELS, names=NAMES, keep="start")
    assert blind.accuracy(begun, LABELS) == pytest.approx(1 / 3)
    start = train_classifier(encoder, TRAIN, LABELS, names=NAMES, keep="start")
    assert start.gates([long + "the lot and ononon go"]).argmax() == 0


def test_order_is_the_callers(classifier):
    names = ["words", "sums"]
    found = classifier.ordered(names)
    assert found.names == ("words", "sums")
    chosen = classifier.probabilities(TEST)[:, [2, 0]]
    wanted = chosen / chosen.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(found.probabilities(TEST), wanted, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"unknown expert 'word'\. Close names: words\."):
        classifier.ordered(["word"])


def test_it_comes_back_as_it_was(encoder, classifier, tmp_path):
    classifier.save(tmp_path)
    found = load_classifier(tmp_path, encoder, select=TopKClasses(k=1))
    assert torch.equal(found.probabilities(TEST), classifier.probabilities(TEST))
    assert (found.names, found.keep) == (classifier.names, "end")
    assert (found.select, load_classifier(tmp_path, encoder).select) == (
        TopKClasses(k=1),
        TopPClasses(),
    )
    # one with fewer classes in its place
    classifier.ordered(["words", "sums"]).save(tmp_path)
    assert load_classifier(tmp_path, encoder).names == ("words", "sums")
    assert len(list(tmp_path.iterdir())) == 2


def test_another_encoder_is_refused(classifier, tmp_path):
    classifier.save(tmp_path / "classifier")
    other = TextEncoder.load(save_encoder(tmp_path / "other", seed=1))
    with pytest.raises(ConfigError, match="made with the encoder"):
        load_classifier(tmp_path / "classifier", other)


def _drop(data: dict[str, Any]) -> None:
    data["names"].pop()


def _dimension(data: dict[str, Any]) -> None:
    data["encoder"]["dimension"] = 31


def _vast(data: dict[str, Any]) -> None:
    data["encoder"]["dimension"] = 10**15


def _newer(data: dict[str, Any]) -> None:
    data["format_version"] = 2


def _keep(data: dict[str, Any]) -> None:
    data["keep"] = "middle"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop, "lists tensors"),
        (_dimension, "lists tensors"),
        (_vast, "lists tensors"),
        (_newer, "format version 2"),
        (_keep, "keep: "),
    ],
)
def test_a_description_that_cannot_be_is_refused(
    encoder: TextEncoder,
    classifier: TextClassifier,
    tmp_path: Path,
    edit: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    classifier.save(tmp_path)
    path = tmp_path / "classifier.json"
    data = json.loads(path.read_text())
    edit(data)
    del data["checksum"]
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        load_classifier(tmp_path, encoder)


def test_labels_that_do_not_fit_are_refused(encoder, classifier):
    for wrong in (LABELS[1:], []):
        with pytest.raises(DataError, match="36 texts have"):
            train_classifier(encoder, TRAIN, wrong, names=NAMES)
    with pytest.raises(DataError, match="0 texts have 0 labels"):
        classifier.accuracy([], [])
    with pytest.raises(DataError, match=r"unknown label 'sum'\. Close names: sums\."):
        train_classifier(encoder, TRAIN[:1], ["sum"], names=NAMES)
    with pytest.raises(DataError, match="no text is labelled 'shouts'"):
        train_classifier(encoder, TRAIN[:1], LABELS[:1], names=NAMES)
    with pytest.raises(ConfigError, match="'sums' is there twice"):
        train_classifier(encoder, TRAIN, LABELS, names=[*NAMES, "sums"])

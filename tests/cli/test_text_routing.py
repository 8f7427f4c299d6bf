"""Mixtures that decide by texts, from `molora compose` to `molora chat`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_experts import save_experts
from tiny_encoders import save_encoder
from tiny_runs import write_rows
from transformers import AutoModelForCausalLM

import molora as package
from molora.compose.centroids import build_centroids
from molora.compose.classifier import TopKClasses, train_classifier
from molora.compose.edit import experts_of
from molora.compose.encoder import TextEncoder
from molora.compose.retrieval import Retriever, SoftmaxWeights
from molora.compose.text_router import TextRouter, load_text_router
from molora.data import Row
from molora.generate import completion_loss, generate_texts, load_for_generation

SAMPLES = {
    "math": ["1 + 1 = 2", "7 * 8 = 56", "9 - 4"],
    "code": ["def f(x):", "return x"],
    "law": ["the court held", "the judge said"],
}
PROMPTS = ["2 + 3 =", "the court of appeal", "def g(y):"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def read(encoder: Path) -> TextEncoder:
    return TextEncoder.load(encoder)


@pytest.fixture(scope="module")
def given(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The base and three experts as options."""
    experts = save_experts(tmp_path_factory.mktemp("experts"), base)
    pairs = [part for name, path in experts.items() for part in ("--expert", f"{name}={path}")]
    return ["--base", base, *pairs]


def user(said: str) -> dict[str, str]:
    return {"role": "user", "content": said}


@pytest.fixture(scope="module")
def samples(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Encoder and samples as options: two files of lines and one of rows, not in order."""
    root = tmp_path_factory.mktemp("samples")
    (root / "law.txt").write_text("\n".join(SAMPLES["law"]) + "\n\n")
    (root / "math").write_text("\n".join(SAMPLES["math"][:2]))
    (root / "more.txt").write_text(SAMPLES["math"][2])
    rows = [
        {"prompt": SAMPLES["code"][0], "completion": "never read"},
        {"messages": [user(SAMPLES["code"][1]), {"role": "assistant", "content": "nor this"}]},
    ]
    write_rows(root / "code.jsonl", rows)
    files = {"law": ["law.txt"], "math": ["math", "more.txt"], "code": ["code.jsonl"]}
    pairs = [f"{name}={root / file}" for name, found in files.items() for file in found]
    return ["--encoder", encoder, *(part for pair in pairs for part in ("--samples", pair))]


@pytest.fixture(scope="module")
def by_retriever(
    base: Path, given: list[Any], samples: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from molora.cli import main

    out = tmp_path_factory.mktemp("mixtures") / "retriever"
    settings = ["weights.kind=softmax", "weights.temperature=0.02", "every=1", "instruction='Q: '"]
    words = ["compose", *given, "--router", "retriever", *samples, *settings, "--out", out]
    assert main([str(word) for word in words]) == 0
    return out


def generated(directory: Path, router: TextRouter | None, gates: Any = None) -> list[str]:
    loaded = load_for_generation(directory)
    options: dict[str, Any] = {"max_new_tokens": 6}
    if router is not None:
        options["deciding"] = router.deciding(loaded.mixture, loaded.tokenizer)
        return generate_texts(loaded, PROMPTS, **options)
    with loaded.mixture.context(expert_gates=gates):
        return generate_texts(loaded, PROMPTS, **options)


def shown(texts: list[str]) -> str:
    return "".join(f"> {prompt}\n{text}\n" for prompt, text in zip(PROMPTS, texts, strict=True))


ASKED = [part for prompt in PROMPTS for part in ("--prompt", prompt)]


def test_a_retriever_is_composed_saved_and_generates_as_the_library_does(
    molora: Callable[..., Any], by_retriever: Path, read: TextEncoder, encoder: Path
) -> None:
    centroids = build_centroids(read, SAMPLES, instruction="Q: ")
    expected = TextRouter(Retriever(read, centroids, SoftmaxWeights(temperature=0.02), "end"), 1)
    found = load_text_router(by_retriever, read)
    assert found.names == ("math", "code", "law")
    assert (found.every, found.decides.keep) == (1, "end")
    assert torch.equal(found.gates(PROMPTS), expected.gates(PROMPTS))
    generate = ["generate", "--adapter", by_retriever, *ASKED, "--max-new-tokens", 6]
    outcome = molora(*generate, "--encoder", encoder)
    assert outcome.code == 0, outcome.err
    texts = generated(by_retriever, expected)
    assert outcome.out == shown(texts)
    # the prompts' gates alone, and no gates but zeros, write something else
    stays = generated(by_retriever, TextRouter(expected.decides))
    assert (
        len({shown(texts), shown(stays), shown(generated(by_retriever, None, torch.zeros(1, 3)))})
        == 3
    )


def test_a_chat_is_decided_by_all_that_was_said(
    molora: Callable[..., Any],
    by_retriever: Path,
    encoder: Path,
    read: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 3\nthe court\n"))
    chat = ["chat", "--adapter", by_retriever, "--encoder", encoder, "--max-new-tokens", 5]
    outcome = molora(*chat)
    assert outcome.code == 0, outcome.err
    loaded = load_for_generation(by_retriever)
    deciding = load_text_router(by_retriever, read).deciding(loaded.mixture, loaded.tokenizer)
    messages: list[dict[str, str]] = []
    for said in ("2 + 3", "the court"):
        messages.append(user(said))
        (text,) = generate_texts(loaded, [messages], max_new_tokens=5, deciding=deciding)
        assert text in outcome.out
        messages.append({"role": "assistant", "content": text})


def test_a_classifier_learns_the_experts_names(
    molora: Callable[..., Any],
    given: list[Any],
    samples: list[Any],
    encoder: Path,
    read: TextEncoder,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    options = ["--router", "classifier", *samples, "select.kind=top_k", "select.k=1"]
    outcome = molora("compose", *given, *options, "--out", out)
    assert outcome.code == 0, outcome.err
    texts = [text for found in SAMPLES.values() for text in found]
    labels = [name for name, found in SAMPLES.items() for _ in found]
    expected = train_classifier(read, texts, labels, names=[*SAMPLES], select=TopKClasses(k=1))
    assert f"classifier  {expected.accuracy(texts, labels):.1%} of 7 samples" in outcome.out
    found = load_text_router(out, read)
    torch.testing.assert_close(found.gates(PROMPTS), expected.gates(PROMPTS))
    assert found.every is None
    generate = ["generate", "--adapter", out, *ASKED, "--max-new-tokens", 6, "--num-beams", 2]
    outcome = molora(*generate, "--encoder", encoder)
    assert outcome.code == 0, outcome.err
    lines = molora("inspect", out).out.splitlines()
    assert "texts    classifier, top_k (k 1); the prompt's gates stay" in lines


def test_inspect_names_the_text_router(
    molora: Callable[..., Any], by_retriever: Path, read: TextEncoder
) -> None:
    lines = molora("inspect", by_retriever).out.splitlines()
    said = "texts    retriever, softmax (temperature 0.02); gates renewed after every token"
    assert said in lines
    identity = read.identity
    told = f"encoder  {identity.name} ({identity.sha256[:12]}), to be given with --encoder"
    assert told in lines


def test_edits_take_the_text_router_along(
    molora: Callable[..., Any],
    base: Path,
    by_retriever: Path,
    read: TextEncoder,
    encoder: Path,
    given: list[Any],
    tmp_path: Path,
) -> None:
    fewer, more, again = tmp_path / "fewer", tmp_path / "more", tmp_path / "again"
    assert molora("compose", "--from", by_retriever, "--drop", "code", "--out", fewer).code == 0
    generate = ["--prompt", "the court", "--max-new-tokens", 4, "--encoder", encoder]
    outcome = molora("generate", "--adapter", fewer, *generate)
    assert outcome.code == 0, outcome.err
    whole = load_text_router(by_retriever, read)
    kept = load_text_router(fewer, read).ordered(["math", "law"]).gates(PROMPTS)
    torch.testing.assert_close(kept, whole.ordered(["math", "law"]).gates(PROMPTS))

    law = given[given.index("--expert") + 1].partition("=")[2]
    outcome = molora("compose", "--from", fewer, "--add", f"art={law}", "--out", more)
    assert "its text router does not know art: give --router" in outcome.out
    assert "lacking  the text router does not know art" in molora("inspect", more).out
    assert "unknown expert 'art'" in molora("generate", "--adapter", more, *generate).err

    (tmp_path / "art.txt").write_text("a portrait\na landscape")
    options = ["--encoder", encoder, "--samples", f"art={tmp_path / 'art.txt'}"]
    compose = ["compose", "--from", more, "--router", "retriever", *options, "--out", again]
    assert "cannot be compared" in molora(*compose).err
    assert not again.exists()
    outcome = molora(*compose, "instruction='Q: '")
    assert outcome.code == 0, outcome.err
    found = load_text_router(again, read)
    texts = {**SAMPLES, "art": ["a portrait", "a landscape"]}
    names = ("math", "law", "art")
    expected = build_centroids(read, {n: texts[n] for n in names}, instruction="Q: ")
    assert found.names == names
    torch.testing.assert_close(found.gates(PROMPTS), Retriever(read, expected).gates(PROMPTS))


def written_by(given: list[Any], weights: dict[str, float]) -> list[dict[str, str]]:
    """What the experts together write with these weights: rows that fit them."""
    from transformers import AutoTokenizer

    pairs = [pair.split("=", 1) for pair in given[3::2]]
    model = AutoModelForCausalLM.from_pretrained(given[1]).eval()
    router = {"kind": "fixed", "weights": weights}
    package.compose(model, package.load_experts(dict(pairs)), router=router)
    tokenizer = AutoTokenizer.from_pretrained(given[1])
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        found = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        rows.append({"prompt": prompt, "completion": text})
    return rows


def loss_of(directory: Path, rows: list[dict[str, str]], **weights: float) -> float:
    """The mean cross entropy of the saved mixture's model; with `weights`, of these instead."""
    loaded = load_for_generation(directory)
    if weights:
        experts = experts_of(loaded.mixture)
        loaded.mixture.detach()
        router = {"kind": "fixed", "weights": weights}
        package.compose(loaded.model, experts, router=router)
    nll, tokens = completion_loss(
        loaded.model, loaded.tokenizer, [Row(where=str(i), **row) for i, row in enumerate(rows)]
    )
    return nll / tokens


def test_lorahub_finds_weights_by_few_rows(
    molora: Callable[..., Any], given: list[Any], tmp_path: Path
) -> None:
    rows = written_by(given, {"math": 1.0, "code": 0.0, "law": -0.5})
    write_rows(tmp_path / "few.jsonl", rows)
    options = ["--router", "lorahub", "--samples", tmp_path / "few.jsonl", "search.budget=30"]
    outcome = molora("compose", *given, *options, "search.seed=3", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    lines = [line.split() for line in outcome.out.splitlines()]
    printed = {line[0]: line[1] for line in lines if len(line) == 2 and line[0] in SAMPLES}
    found = package.load(AutoModelForCausalLM.from_pretrained(given[1]), tmp_path / "out")
    router = found.config.groups[0].router
    assert (found.config.method, router.kind) == ("fixed", "fixed")
    assert found.config.groups[0].expert.missing == "zero"  # as while it was searched
    assert [f"{weight:.4f}" for weight in router.weights] == [printed[name] for name in SAMPLES]
    # what was found on gates is what the saved mixture does, and better than the base alone
    loss = loss_of(tmp_path / "out", rows)
    zero = loss_of(tmp_path / "out", rows, math=0.0, code=0.0, law=0.0)
    line = next(line for line in lines if line[0] == "loss")
    assert abs(float(line[1]) - loss) < 2e-4
    assert abs(float(line[5]) - zero) < 2e-4
    assert loss < zero - 0.1
    assert loss < loss_of(tmp_path / "out", rows, math=0.0, code=1.0, law=0.5)
    again = molora("compose", *given, *options, "search.seed=3", "--out", tmp_path / "again")
    assert again.out.replace("again", "out") == outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--router", "retriever"], "--samples NAME=FILE for each expert"),
        (["--router", "retriever", "--samples", "math=FILE"], "--encoder with its directory"),
        (
            ["--router", "retriever", "--samples", "FILE", "--encoder", "ENC"],
            "not of the form NAME=FILE",
        ),
        (["--samples", "math=FILE"], "are for the routers retriever, classifier, lorahub"),
        (["--router", "lorahub"], "--samples FILE"),
        (["--router", "lorahub", "--samples", "FILE"], "has no known suffix"),
        (["--router", "lorahub", "--samples", "ROWS", "router.top_k=1"], "has search.… alone"),
        (["--router", "lorahub", "--samples", "ROWS", "search.bugdet=3"], "Close names: budget"),
        (["--router", "lorahub", "--samples", "ROWS", "--encoder", "ENC"], "needs no --encoder"),
        (["--router", "lorahub", "--samples", "ROWS", "--missing", "renorm"], "does not go with"),
        (["SOME", "weights.temperature=1"], "unknown key 'temperature'"),
        (["SOME", "search.budget=1"], "unknown section 'search'"),
        (["SOME", "every=0"], "every"),
        (["SOME", "--train", "ROWS"], "--train does not go with --router retriever"),
        (["SOME", "--samples", "new=FILE"], "unknown expert 'new'"),
        (["SOME"], "no texts of the expert code: give code=FILE"),
        (["SOME", "--samples", "code=MISSING"], "cannot be read"),
        (["SOME", "--samples", "code=EMPTY"], "has no samples"),
        (
            ["SOME", "--samples", "code=FILE", "--encoder", "FILE"],
            "neither a directory nor an installed package",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_writes_nothing(
    options: list[str],
    message: str,
    molora: Callable[..., Any],
    given: list[Any],
    encoder: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    files = {"FILE": "texts.txt", "EMPTY": "empty.txt", "ROWS": "rows.jsonl", "MISSING": "none"}
    some = ["--router", "retriever", "--encoder", "ENC"]
    some += ["--samples", "math=FILE", "--samples", "law=FILE"]
    words = [word for option in options for word in (some if option == "SOME" else [option])]
    for name, file in files.items():
        words = [word.replace(name, str(tmp_path / file)) for word in words]
    words = [str(encoder) if word == "ENC" else word for word in words]
    outcome = molora("compose", *given, *words, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


def test_samples_are_checked_before_the_base_is_loaded(
    molora: Callable[..., Any],
    given: list[Any],
    samples: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = []
    monkeypatch.setattr("molora.train.loading.load_model", loaded.append)
    compose = ["compose", *given, "--router", "retriever", *samples[:4], "--out", tmp_path / "out"]
    assert "no texts of the expert" in molora(*compose).err
    assert not loaded


def test_generation_says_what_gates_need(
    molora: Callable[..., Any],
    adapter: Path,
    by_retriever: Path,
    given: list[Any],
    encoder: Path,
    read: TextEncoder,
    tmp_path: Path,
) -> None:
    def refused(directory: Path, *words: Any) -> str:
        outcome = molora("generate", "--adapter", directory, "--prompt", "a", *words)
        assert (outcome.code, outcome.out) == (2, "")
        return outcome.err

    name = f"{read.identity.name} ({read.identity.sha256[:12]})"
    assert f"reads texts by the encoder {name}" in refused(by_retriever)
    other = save_encoder(tmp_path / "other", seed=1)
    assert "made with the encoder" in refused(by_retriever, "--encoder", other)
    beams = ["--encoder", encoder, "--num-beams", 2]
    assert "--num-beams 2: this mixture's gates are renewed" in refused(by_retriever, *beams)
    assert "decides by itself" in refused(adapter, "--encoder", encoder)
    compose = ["compose", *given, "--router", "given", "--out", tmp_path / "plain"]
    assert molora(*compose).code == 0
    assert "no text router is saved with it" in refused(tmp_path / "plain", "--encoder", encoder)
    assert "texts    no text router" in molora("inspect", tmp_path / "plain").out
    (by_retriever / "centroids.json").rename(tmp_path / "kept")
    try:
        assert "has no centroids.json" in refused(by_retriever, "--encoder", encoder)
        assert molora("inspect", by_retriever).code == 2
    finally:
        (tmp_path / "kept").rename(by_retriever / "centroids.json")

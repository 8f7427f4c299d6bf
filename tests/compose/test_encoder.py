"""Sentence embeddings: what one text alone gives in float64, whatever it is batched with."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import POSITIONS, byte_tokenizer, reference, save_encoder, set_modules
from tiny_models import tiny

from molora.compose.encoder import BATCH, TextEncoder
from molora.errors import CheckpointError, ConfigError, DataError

SENTENCE = "the cat sat on a mat while seven grey owls looked at it from an old oak"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 7]) + "!" * (i % 3) for i in range(BATCH + 9)]
LONG = "a text that has many more bytes than the encoder has positions"
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
STEPS = ("Transformer", "Pooling", "Normalize")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def encoder(directory: Path) -> TextEncoder:
    return TextEncoder.load(directory)


@pytest.fixture
def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def test_texts_of_any_length_have_the_vectors_that_they_have_alone(directory, encoder):
    texts = [*TEXTS, LONG, "", "  blanks around  "]
    found = encoder.encode(texts)
    assert (found.shape, found.dtype) == ((len(texts), 32), torch.float32)
    wanted = reference(directory, texts)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    # and texts that differ are further apart than that
    vectors = reference(directory, sorted({text[: POSITIONS - 2] for text in TEXTS}))
    distances = (vectors[:, None] - vectors).abs().amax(dim=-1) + torch.eye(len(vectors))
    assert distances.min() > 1e-2
    assert not found.requires_grad


def test_the_end_of_a_long_text_is_read_if_asked(directory, encoder):
    texts = [LONG, "short"]
    found = encoder.encode(texts, keep="end")
    torch.testing.assert_close(found, reference(directory, texts, keep="end"), atol=1e-6, rtol=0)
    start = encoder.encode(texts)
    assert (found[0] - start[0]).abs().max() > 1e-2
    torch.testing.assert_close(found[1], start[1], atol=1e-6, rtol=0)


def test_equal_texts_have_equal_vectors_and_the_same_call_the_same_bits(encoder):
    found = encoder.encode([*TEXTS, *TEXTS, LONG])
    assert torch.equal(found[: len(TEXTS)], found[len(TEXTS) : 2 * len(TEXTS)])
    assert torch.equal(found, encoder.encode([*TEXTS, *TEXTS, LONG]))
    backwards = encoder.encode([*TEXTS[::-1]])
    torch.testing.assert_close(backwards.flip(0), found[: len(TEXTS)], atol=1e-6, rtol=0)
    assert encoder.encode([]).shape == (0, 32)


def test_a_callers_autocast_does_not_reach_it(encoder):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder.encode(TEXTS)
    assert torch.equal(found, encoder.encode(TEXTS))


def test_the_directory_says_how_tokens_become_a_vector(copied, encoder):
    for pooling, cls in ((MEAN, False), (CLS, True), ({"pooling_mode": "cls"}, True)):
        set_modules(copied, pooling=pooling, steps=STEPS)
        found = TextEncoder.load(copied).encode(TEXTS[:4])
        torch.testing.assert_close(found, reference(copied, TEXTS[:4], cls=cls), atol=1e-6, rtol=0)
        assert torch.equal(found, encoder.encode(TEXTS[:4])) != cls


def test_texts_are_lowered_where_the_directory_says_so(copied, encoder):
    (copied / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    lowering = TextEncoder.load(copied)
    assert torch.equal(lowering.encode(["ABC"]), encoder.encode(["abc"]))
    assert not torch.equal(encoder.encode(["ABC"]), encoder.encode(["abc"]))
    assert lowering.identity.sha256 != encoder.identity.sha256


@pytest.mark.parametrize(
    ("pooling", "steps", "message"),
    [
        ({"pooling_mode_max_tokens": True}, STEPS, r"pools by \['pooling_mode_max_tokens'\]"),
        ({**MEAN, "pooling_mode_cls_token": True}, STEPS, "pools by"),
        ({"pooling_mode": "lasttoken"}, STEPS, r"pools by \['lasttoken'\]"),
        (None, STEPS, "missing or no set of settings"),
        (MEAN, (*STEPS, "Dense"), "a step 'Dense'"),
    ],
    ids=["max", "both", "last", "missing", "dense"],
)
def test_what_would_be_another_vector_is_refused(copied, pooling, steps, message):
    set_modules(copied, pooling=pooling, steps=steps)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.load(copied)


@pytest.mark.parametrize("path", ["../1_Pooling", "..", "/etc", ""])
def test_settings_are_read_from_the_directory_alone(copied, path):
    set_modules(copied, pooling=MEAN, steps=STEPS)
    modules = json.loads((copied / "modules.json").read_text())
    modules[1]["path"] = path
    (copied / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="places the pooling in"):
        TextEncoder.load(copied)


def test_the_longest_text_is_what_directory_and_caller_say(copied, encoder):
    assert encoder.max_length == POSITIONS
    (copied / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10}))
    found = TextEncoder.load(copied)
    assert found.max_length == 10
    # the length of texts does not change the space
    assert found.identity.sha256 == encoder.identity.sha256
    torch.testing.assert_close(found.encode([LONG]), encoder.encode([LONG[:8]]))
    assert TextEncoder.load(copied, max_length=5).max_length == 5
    for length in (2, POSITIONS + 1):
        with pytest.raises(ConfigError, match=rf"max_length={length}; .* reads 3 to {POSITIONS}"):
            TextEncoder.load(copied, max_length=length)


def test_positions_that_a_roberta_keeps_for_padding_are_not_used(tmp_path):
    encoder = TextEncoder.load(save_encoder(tmp_path, "roberta", pad_token_id=0))
    assert encoder.max_length == POSITIONS - 1
    assert encoder.encode([LONG, "a"]).shape == (2, 32)


def test_identity_is_that_of_the_files_that_count(copied, encoder):
    sha256 = encoder.identity.sha256
    (copied / "README.md").write_text("words")
    assert TextEncoder.load(copied).identity.sha256 == sha256
    assert TextEncoder.load(copied).identity.dimension == 32
    set_modules(copied, pooling=CLS, steps=STEPS)
    assert TextEncoder.load(copied).identity.sha256 != sha256
    shutil.rmtree(copied / "1_Pooling")
    (copied / "modules.json").unlink()
    weights = load_file(copied / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][3] += 1e-6
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert TextEncoder.load(copied).identity.sha256 != sha256


def _only_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _incomplete(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _truncated(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def _no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def _own_code(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.C"},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text(f"open({str(path / 'ran')!r}, 'w')\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_only_pickle, "safetensors"),
        (_incomplete, r"no values for encoder\.layer\.1\.output\.dense\.weight"),
        (_truncated, "cannot be loaded"),
        (_no_tokenizer, "cannot be loaded"),
        (_own_code, "cannot be loaded"),
    ],
)
def test_a_directory_that_is_no_encoder_is_refused(copied, damage, message):
    damage(copied)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.load(copied)
    assert not (copied / "ran").exists()


def test_a_head_that_is_not_used_may_be_missing(copied, encoder):
    weights = load_file(copied / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(TextEncoder.load(copied).encode(TEXTS), encoder.encode(TEXTS))


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    tiny("t5", vocab_size=260).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="an encoder with a decoder"):
        TextEncoder.load(tmp_path)


def test_weights_that_are_not_finite_are_named_when_they_show(copied):
    weights = load_file(copied / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][3] = torch.nan
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="gives NaN or infinity"):
        TextEncoder.load(copied).encode(["a"])


def test_nothing_is_fetched(tmp_path):
    with pytest.raises(CheckpointError, match="neither a directory nor an installed package"):
        TextEncoder.load("sentence-transformers/all-MiniLM-L6-v2")
    with pytest.raises(CheckpointError, match="neither a directory"):
        TextEncoder.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="contains 0 directories"):
        TextEncoder.load("pytest")


def test_a_package_is_found_by_its_name_and_not_imported(directory, encoder, monkeypatch, tmp_path):
    package = tmp_path / "my_encoder"
    shutil.copytree(directory, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    info = tmp_path / "my_encoder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-encoder\nVersion: 1.0\n")
    files = [p.relative_to(tmp_path) for p in package.rglob("*") if p.is_file()]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = TextEncoder.load("my-encoder")
    assert torch.equal(found.encode(TEXTS), encoder.encode(TEXTS))
    assert found.identity.name == "my_encoder/model"
    assert "my_encoder" not in sys.modules


def test_only_texts_are_embedded(encoder, tmp_path):
    for wrong in ("one text", [1], ["a", None]):
        with pytest.raises(DataError, match="takes a list of texts"):
            encoder.encode(wrong)
    bare = TextEncoder.load(save_encoder(tmp_path, special=False))
    assert bare.encode(["a"]).shape == (1, 32)
    with pytest.raises(DataError, match=r"text 1 \('  '\) has no tokens"):
        bare.encode(["a", "  "])


@pytest.mark.slow
def test_minilm_gives_what_sentence_transformers_gives(monkeypatch):
    """Values of package sentence-transformers 6.2.0 for the same directory."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    encoder = TextEncoder.load(import_module("examples.assets").minilm())
    assert (encoder.max_length, encoder.identity.dimension) == (256, 384)
    texts = [
        "How do I sort a list in Python?",
        "What is the way to order a Python list?",
        "The cat sat on the mat in the sun.",
        "word " * 400 + " the end",
        "  padded  ",
        "",
    ]
    theirs = torch.tensor(
        [
            [0.01017491, 0.05540411, 0.03383187],
            [-0.02284211, 0.02923007, 0.04841261],
            [0.12860613, 0.04154685, -0.01953452],
            [-0.00812365, -0.09558597, -0.03867314],
            [0.03869194, 0.06205039, -0.05908884],
            [-0.11883832, 0.04829871, -0.00254813],
        ]
    )
    found = encoder.encode(texts)
    torch.testing.assert_close(found[:, :3], theirs, atol=1e-5, rtol=0)
    assert (encoder.encode(texts, keep="end")[3, :3] - theirs[3]).abs().max() > 1e-3
    cosines = found @ found.T
    torch.testing.assert_close(cosines.diagonal(), torch.ones(6), atol=1e-5, rtol=0)
    assert cosines[0, 1] == pytest.approx(0.8001, abs=1e-3)  # a paraphrase
    assert cosines[0, 2] == pytest.approx(0.0049, abs=1e-3)  # nothing in common

"""`molora data preview`: what a run would train on, with colours and without."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_models import chat_tokenizer

from molora.config.data import DataConfig
from molora.data import packing_rates, tokenize

ROOT = Path(__file__).resolve().parents[2]
Config = Callable[..., Path]


def write(path: Path, *words: str, **columns: Any) -> str:
    rows = [{"prompt": f"{w}?", "completion": f"it is {w}", **columns} for w in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    letters = write(tmp_path / "letters.jsonl", *"abcdef", task="letters")
    numbers = write(tmp_path / "numbers.jsonl", "1", "22", task="numbers")
    return {"train": [{"path": letters, "weight": 1}, {"path": numbers, "weight": 3}]}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Data settings → a run's YAML, whose model is a directory with a tokenizer and no weights."""

    def written(data: dict[str, Any], **sections: Any) -> Path:
        chat_tokenizer().save_pretrained(tmp_path / "model")
        model = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (tmp_path / "model" / "config.json").write_text(json.dumps(model))
        path = tmp_path / "run.yaml"
        run = {"model": {"name": str(tmp_path / "model")}, "data": data}
        path.write_text(yaml.safe_dump({**run, "mixture": {"preset": "mola"}, **sections}))
        return path

    return written


def figures(out: str, heading: str, name: str) -> list[str]:
    """The cells of a row below a heading: on the line of its name, or on the next."""
    lines = out.partition(f"\n{heading} ")[2].partition("\n\n")[0].splitlines()[1:]
    (place,) = (place for place, line in enumerate(lines) if line.split()[0].endswith(name))
    return lines[place].split()[1:] or lines[place + 1].split()


def test_rows_are_shown_with_brackets_where_there_is_no_colour(
    molora: Callable[..., Any], config: Config, data: dict[str, Any]
) -> None:
    outcome = molora("data", "preview", config(data), "--width", 160)
    assert (outcome.code, outcome.err) == (0, "")
    legend, _, rest = outcome.out.partition("\n")
    assert legend == "without loss · ⟦supervised: with a loss⟧ · ⟪cut off by max_length⟫"
    samples, _, _ = rest.partition("\nSources")
    headings = re.findall(r"^(\S+), line (\d+): \d+ tokens, \d+ supervised$", samples, re.MULTILINE)
    paths = [source["path"] for source in data["train"]]
    assert headings == [(paths[0], "1"), (paths[1], "1"), (paths[0], "2"), (paths[1], "2")]
    assert samples.count("⟦") == 4
    assert "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦it is a<|im_end|>⟧\n" in samples
    assert "⟪" not in samples
    assert "\x1b" not in outcome.out


def test_sources_and_tasks_show_counts_and_shares(
    molora: Callable[..., Any], config: Config, data: dict[str, Any], tmp_path: Path
) -> None:
    data["eval"] = [write(tmp_path / "held_out.jsonl", "z", task="letters")]
    out = molora("data", "preview", config(data), "--width", 160).out
    result = tokenize(DataConfig.parse(data), chat_tokenizer())
    for part, drawn, share in zip(result.train_parts, "26", ("25.0", "75.0"), strict=True):
        counts = part.counts
        supervised = f"{100 * counts.supervised / counts.tokens:.1f}"
        rows = str(counts.rows)
        expected = [rows, rows, supervised, "%", "0", "0", drawn, share, "%"]
        assert figures(out, "Sources", part.source.path.name) == expected
    assert figures(out, "Sources", "held_out.jsonl")[-2:] == ["1", "eval"]
    assert figures(out, "Tasks", "letters") == ["2", "25.0", "%"]
    assert figures(out, "Tasks", "numbers") == ["6", "75.0", "%"]
    without = {"train": [data["train"][0]["path"]]}
    rows = Path(without["train"][0]).read_text().replace(', "task": "letters"', "")
    Path(without["train"][0]).write_text(rows)
    assert "Tasks" not in molora("data", "preview", config(without)).out


def test_lengths_show_what_is_cut_left_out_and_packed(
    molora: Callable[..., Any], config: Config, data: dict[str, Any]
) -> None:
    whole = tokenize(DataConfig.parse(data), chat_tokenizer()).train["input_ids"]
    limit = data["max_length"] = max(map(len, whole)) - 2  # cuts the stop token of "22"
    path = Path(data["train"][1]["path"])
    long = json.dumps({"prompt": "x" * 70, "completion": "y", "task": "numbers"})
    path.write_text(path.read_text() + long + "\n")
    outcome = molora("data", "preview", config(data), "--width", 160, "--rows", 6)
    result = tokenize(DataConfig.parse(data), chat_tokenizer())
    counts = result.train_counts
    assert (counts.examples, counts.truncated, counts.dropped) == (8, 1, 1)
    assert "⟦it is 22⟧⟪<|im_end|>" in outcome.out
    assert (
        f"max_length {limit} cuts 1 of 9 examples (11.1 %) and leaves out 1 (11.1 %)" in outcome.out
    )
    assert f"{counts.tokens} tokens are left, {counts.supervised} of them" in outcome.out
    lengths = [len(ids) for ids in result.train["input_ids"]]
    rates = packing_rates(lengths, limit)
    into = f" the {rates.sequences} sequences of an epoch into {rates.bins} rows"
    assert f"data.packing: true would put{into}" in outcome.out
    packed = molora("data", "preview", config(data), "data.packing=true", "--width", 160).out
    assert f"\npacking puts{into}" in packed
    assert f"{rates.fill:.1f} % full" in outcome.out
    (longest,) = re.findall(r"longest (\d+)", outcome.out)
    assert int(longest) == max(max(part.lengths) for part in result.train_parts) > limit
    drawn = re.findall(r"^ *(?:\d+–\d+|\d+ on)  █* ?(\d+)$", outcome.out, re.MULTILINE)
    assert sum(map(int, drawn)) == 9


def test_cut_tokens_are_marked_and_counted(
    molora: Callable[..., Any], config: Config, data: dict[str, Any]
) -> None:
    path = config({"train": [data["train"][0]["path"]]})
    tokens = len(
        tokenize(DataConfig.parse({"train": data["train"]}), chat_tokenizer()).train[0]["input_ids"]
    )
    out = molora("data", "preview", path, f"data.max_length={tokens - 3}", "--rows", 1).out
    # one token per byte, the end of turn one, and a line break behind it
    assert "⟦it is ⟧⟪a<|im_end|>" in out
    assert f"{tokens} tokens, 6 supervised, 3 cut off" in out
    assert molora("data", "preview", path, "--rows", 0).out.count("⟦") == 0


def test_preferences_are_shown_with_either_answer(
    molora: Callable[..., Any], config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}\n')
    run = config({"train": [str(path)]}, train={"objective": "dpo"})
    outcome = molora("data", "preview", run, "--width", 160)
    assert outcome.code == 0
    before = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for answer, text in (("chosen", "Hello"), ("rejected", "Go")):
        heading = rf"{re.escape(str(path))}, line 1, {answer}: \d+ tokens, {len(text) + 1} superv"
        assert re.search(heading, outcome.out)
        assert f"{before}⟦{text}<|im_end|>⟧" in outcome.out
    assert "packing" not in outcome.out
    supervised = molora("data", "preview", config({"train": [str(path)]}))
    assert (supervised.code, "train.objective: dpo" in supervised.err) == (2, True)


def test_a_column_that_training_would_miss_is_missed(
    molora: Callable[..., Any], config: Config, data: dict[str, Any]
) -> None:
    outcome = molora("data", "preview", config(data, mixture={"preset": "loramoe"}))
    assert outcome.code == 2
    assert "data.train has no column `task_types`" in outcome.err


@pytest.mark.parametrize("no_colour", [False, True], ids=["colour", "NO_COLOR"])
def test_on_a_terminal_colours_take_the_place_of_brackets(
    molora: Callable[..., Any],
    config: Config,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    no_colour: bool,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    out = molora("data", "preview", config(data), "--width", 160).out
    assert ("⟦it is a<|im_end|>⟧" in out) == no_colour
    assert ("\x1b[1;32mit is a<|im_end|>\x1b[0m" in out) == (not no_colour)


def test_long_texts_are_shown_by_their_ends(
    molora: Callable[..., Any], config: Config, tmp_path: Path
) -> None:
    path = write(tmp_path / "long.jsonl", "b" + 5000 * "x" + "e")
    out = molora("data", "preview", config({"train": [path], "max_length": 20000})).out
    text = re.sub(r"\s", "", out)
    assert "xxxxxxxxe<|im_end|>⟧" in text
    assert re.search(r"⟦itisbx+…3,\d+characters…x+e", text)
    assert text.count("x") < 4500


def test_control_characters_of_the_data_do_not_reach_the_terminal(
    molora: Callable[..., Any], config: Config, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "bad.jsonl", "\x1b]0;title\x07\x9b2J\u202eévil\ttab", task="\x1b[31mred"
    )
    out = molora("data", "preview", config({"train": [path]}), "--width", 160).out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out)
    assert r"\x1b]0;title\x07\x9b2J\u202eévil" in out
    assert figures(out, "Tasks", r"\x1b[31mred") == ["1", "100.0", "%"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"train": ["missing.jsonl"]}, [], "missing.jsonl does not exist"),
        ({"train": [{"path": "a", "name": "b/c"}]}, [], "either `path`"),
        ({"train": [{"name": "owner/none", "split": "train"}]}, [], "cannot be loaded"),
        ({}, ["data.max_length=3"], "max_length cuts all 8 rows"),
        ({}, ["model.name=nowhere/at-all"], "model.name='nowhere/at-all' cannot be loaded"),
        ({}, ["--width", "5"], "Invalid value for '--width'"),
        ({}, ["data.max_lenght=5"], "Close names: max_length"),
    ],
)
def test_a_mistake_is_exit_code_2_and_one_message(
    molora: Callable[..., Any],
    config: Config,
    data: dict[str, Any],
    change: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    outcome = molora("data", "preview", config({**data, **change}), *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("Error") == 1


def test_a_bad_row_is_named(
    molora: Callable[..., Any], config: Config, data: dict[str, Any]
) -> None:
    path = Path(data["train"][0]["path"])
    path.write_text(path.read_text() + '{"prompt": "a"}\n')
    outcome = molora("data", "preview", config(data))
    assert outcome.code == 2
    assert "letters.jsonl, line 7: `prompt` needs a `completion`" in outcome.err


def test_it_needs_no_weights_and_imports_no_trainer(config: Config, data: dict[str, Any]) -> None:
    code = (
        "import json, sys\n"
        "from molora.cli import main\n"
        f"code = main(['data', 'preview', {str(config(data))!r}])\n"
        "print(json.dumps([code, sorted(sys.modules)]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    *shown, last = done.stdout.splitlines()
    exit_code, modules = json.loads(last)
    assert exit_code == 0
    assert any("⟦it is a" in line for line in shown)
    assert not {"trl", "deepspeed", "peft", "matplotlib", "molora.train.run"} & set(modules)
    assert "datasets" in modules

"""What a preview tells of rows and lengths."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora.config.data import DataConfig
from molora.data import packing_rates, tokenize
from molora.data.preference import tokenize_pairs
from molora.data.preview import Sample, figures, histogram, pair_samples, quantile, samples
from molora.errors import DataError

counters = st.dictionaries(st.integers(1, 5000), st.integers(1, 50), min_size=1).map(Counter)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(*words: str, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{w}? ", "completion": f"it is {w}", **columns} for w in words]


def kinds(sample: Sample) -> list[tuple[str, str]]:
    return [(run.kind, run.text) for run in sample.runs]


def test_runs_are_the_text_of_the_template_with_its_answers_marked(tmp_path, family):
    messages = [
        {"role": role, "content": content}
        for role, content in (
            ("user", "é?"),
            ("assistant", "ü!"),
            ("user", "b"),
            ("assistant", "c"),
        )
    ]
    config = DataConfig.parse({"train": [write(tmp_path / "a.jsonl", [{"messages": messages}])]})

    (sample,) = samples(config, family.tokenizer, rows=3)

    assert (sample.source, sample.where) == (str(tmp_path / "a.jsonl"), "a.jsonl, line 1")
    text = family.tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(run.text for run in sample.runs).strip() == text.strip()
    answers = [run.text for run in sample.runs if run.kind == "supervised"]
    assert [answer.strip() for answer in answers] == [f"ü!{family.stop}", f"c{family.stop}"]
    assert {run.kind for run in sample.runs} == {"prompt", "supervised"}
    (example,) = tokenize(config, family.tokenizer).train
    assert sum(run.tokens for run in sample.runs) == len(example["input_ids"])
    assert sample.tokens("supervised") == sum(label != -100 for label in example["labels"])


def test_what_max_length_cuts_is_shown_as_cut(tmp_path, plain_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a b", "completion": "ccccc"}])
    config = DataConfig.parse({"train": [path], "max_length": 5})
    (sample,) = samples(config, plain_tokenizer, rows=1)
    assert "".join(text for _, text in kinds(sample)) == "a bccccc</s>"
    assert [kind for kind, _ in kinds(sample)] == ["prompt", "supervised", "cut"]
    assert sample.tokens("prompt") + sample.tokens("supervised") == 5
    assert kinds(sample)[-1][1].endswith("c</s>")


def test_a_row_of_several_examples_shows_them_all(tmp_path, qwen3_tokenizer):
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": f"say {n}"} for n, role in enumerate(roles)]
    config = DataConfig.parse({"train": [write(tmp_path / "a.jsonl", [{"messages": messages}])]})
    found = samples(config, qwen3_tokenizer, rows=1)
    assert [sample.runs[-2].text.split()[-1] for sample in found] == ["1<|im_end|>", "3<|im_end|>"]


def test_a_preference_is_shown_with_either_answer(tmp_path, smollm2_tokenizer):
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away", "task": "manners"}
    path = write(tmp_path / "a.jsonl", [row])
    config = DataConfig.parse({"train": [path]})

    chosen, rejected = pair_samples(config, smollm2_tokenizer, rows=1)

    assert [sample.answer for sample in (chosen, rejected)] == ["chosen", "rejected"]
    assert kinds(chosen)[0] == kinds(rejected)[0]
    assert kinds(chosen)[0][1].endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert kinds(chosen)[1:] == [("supervised", "Hello<|im_end|>")]
    assert kinds(rejected)[1:] == [("supervised", "Go away<|im_end|>")]
    short = DataConfig.parse({"train": [path], "max_length": chosen.runs[0].tokens + 1})
    cut, _ = pair_samples(short, smollm2_tokenizer, rows=1)
    assert [kind for kind, _ in kinds(cut)] == ["prompt", "supervised", "cut"]
    found = figures(config, tokenize_pairs(config, smollm2_tokenizer))
    assert (found.tasks, found.packing) == ({"manners": 1}, None)
    supervised = DataConfig.parse({"train": [write(tmp_path / "b.jsonl", pairs("a"))]})
    with pytest.raises(DataError, match="a preference needs"):
        next(pair_samples(supervised, smollm2_tokenizer, rows=1))


def test_sources_are_shown_in_turn(tmp_path, plain_tokenizer):
    files = [
        write(tmp_path / "long.jsonl", pairs("a", "b", "c", "d")),
        write(tmp_path / "short.jsonl", pairs("x")),
    ]
    config = DataConfig.parse({"train": files})
    shown = [sample.where for sample in samples(config, plain_tokenizer, rows=4)]
    assert shown == [
        "long.jsonl, line 1",
        "short.jsonl, line 1",
        "long.jsonl, line 2",
        "long.jsonl, line 3",
    ]
    assert len(list(samples(config, plain_tokenizer, rows=99))) == 5


def test_figures_are_those_of_an_epoch(tmp_path, plain_tokenizer):
    sources = [
        {"path": write(tmp_path / "a.jsonl", pairs(*"abcdef")), "task": "letters", "weight": 1},
        {"path": write(tmp_path / "n.jsonl", pairs("1", "1 2 3")), "task": "numbers", "weight": 3},
    ]
    config = DataConfig.parse({"train": sources, "max_length": 20})
    tokenized = tokenize(config, plain_tokenizer)

    found = figures(config, tokenized)

    assert found.tasks == {"letters": 2, "numbers": 6}
    assert found.lengths.total() == 8  # rows of the sources, each once
    lengths = [len(ids) for ids in tokenized.train["input_ids"]]
    assert found.packing == packing_rates(lengths, 20)
    assert found.packing.sequences == 8
    # of a data set that is packed they are the same
    packing = config.model_copy(update={"packing": True})
    packed = tokenize(packing, plain_tokenizer)
    assert len(packed.train) == found.packing.bins < 8
    assert figures(packing, packed) == found


def test_tasks_are_empty_where_rows_have_none(tmp_path, plain_tokenizer):
    config = DataConfig.parse({"train": [write(tmp_path / "a.jsonl", pairs("a"))]})
    assert figures(config, tokenize(config, plain_tokenizer)).tasks == {}


@given(lengths=counters, share=st.floats(0.01, 1))
def test_quantile_is_the_first_length_that_covers_the_share(lengths, share):
    ordered = sorted(lengths.elements())
    found = quantile(lengths, share)
    covered = sum(length <= found for length in ordered)
    below = sum(length < found for length in ordered)
    assert below < share * len(ordered) <= covered
    assert quantile(lengths, 1) == ordered[-1]


@given(lengths=counters)
def test_bins_are_equal_successive_and_hold_every_example(lengths):
    bins = histogram(lengths)
    assert sum(count for *_, count in bins) == lengths.total()
    assert len(bins) <= 14
    assert all(before[1] + 1 == after[0] for before, after in pairwise(bins))
    closed = [(low, high) for low, high, _ in bins if high is not None]
    assert len({high - low + 1 for low, high in closed}) == 1
    assert bins[0][0] <= min(lengths)
    for low, high, count in bins:
        inside = [n for length, n in lengths.items() if low <= length <= (high or 5000)]
        assert count == sum(inside)


@pytest.mark.parametrize(
    ("lengths", "first", "last"),
    [
        ([3], (3, 3, 1), (3, 3, 1)),
        ([1, 12], (1, 1, 1), (12, 12, 1)),
        ([1, 13], (1, 2, 1), (13, 14, 1)),
        ([95, 130], (81, 100, 1), (121, 140, 1)),
        # one long example in a thousand does not stretch the bins
        ([*[10] * 999, 9000], (10, 10, 999), (11, None, 1)),
    ],
)
def test_bins_have_round_widths(lengths, first, last):
    bins = histogram(Counter(lengths))
    assert (bins[0], bins[-1]) == (first, last)

"""Files → token datasets: columns, counts, task numbers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molora.config.data import DataConfig, DataSource
from molora.data import IGNORED, Counts, read, tokenize
from molora.data import tokenized as tokenized_module
from molora.data.mask import RowEncoder
from molora.errors import DataError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(*numbers: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"number {n}?", "completion": f"it is {n}", **columns} for n in numbers]


def test_rows_of_all_files_in_order_as_the_encoder_gives_them(tmp_path, family, monkeypatch):
    monkeypatch.setattr(tokenized_module, "_CHUNK", 2)  # three chunks of Arrow memory
    files = [write(tmp_path / "a.jsonl", pairs(1, 2, 3)), write(tmp_path / "b.jsonl", pairs(4, 5))]
    config = DataConfig.parse({"train": files})

    result = tokenize(config, family.tokenizer)

    encoder = RowEncoder(family.tokenizer)
    expected = [encoder(row)[0] for source in config.train for row in read(source)]
    assert result.train["input_ids"][:] == [example.input_ids for example in expected]
    assert result.train["labels"][:] == [example.labels for example in expected]
    assert len({tuple(example.labels) for example in expected}) == 5
    assert sorted(result.train.column_names) == ["input_ids", "labels"]
    assert (result.eval, result.eval_counts, result.tasks) == (None, None, ())


def test_task_numbers_follow_sorted_names_over_train_and_eval(tmp_path, smollm2_tokenizer):
    config = {
        "train": [
            {"path": write(tmp_path / "z.jsonl", pairs(1, 2)), "task": "zoology"},
            {"path": write(tmp_path / "m.jsonl", pairs(3, task="music"))},
        ],
        "eval": [{"path": write(tmp_path / "a.jsonl", pairs(4)), "task": "art"}],
    }
    result = tokenize(DataConfig.parse(config), smollm2_tokenizer)
    assert result.tasks == ("art", "music", "zoology")
    assert result.train["task_ids"][:] == [2, 2, 1]
    assert result.eval is not None
    assert result.eval["task_ids"][:] == [0]


@pytest.mark.parametrize("column", ["task_types", "cluster_ids", "expert_labels"])
def test_numbers_are_a_column_only_where_rows_have_them(tmp_path, smollm2_tokenizer, column):
    rows = [*pairs(1, **{column: 1}), *pairs(2, **{column: 0})]
    config = {
        "train": [write(tmp_path / "a.jsonl", rows)],
        "eval": [write(tmp_path / "b.jsonl", pairs(1))],
    }
    result = tokenize(DataConfig.parse(config), smollm2_tokenizer)
    assert result.train.column_names == ["input_ids", "labels", column]
    assert result.train[column][:] == [1, 0]
    assert result.eval is not None
    assert column not in result.eval.column_names


@pytest.mark.parametrize("column", ["task", "task_types", "cluster_ids", "expert_labels"])
def test_a_column_in_some_rows_only_is_refused(tmp_path, smollm2_tokenizer, column):
    value = "x" if column == "task" else 1
    with_it = write(tmp_path / "with.jsonl", pairs(1, **{column: value}))
    files = [with_it, write(tmp_path / "without.jsonl", pairs(2))]
    message = rf"^without\.jsonl, line 1 has no `{column}`, but with\.jsonl, line 1 has one"
    with pytest.raises(DataError, match=message):
        tokenize(DataConfig.parse({"train": files}), smollm2_tokenizer)


def test_task_in_train_but_not_in_eval_is_refused(tmp_path, smollm2_tokenizer):
    config = {
        "train": [write(tmp_path / "a.jsonl", pairs(1, task="x"))],
        "eval": [write(tmp_path / "b.jsonl", pairs(2))],
    }
    with pytest.raises(DataError, match=r"^b\.jsonl, line 1 has no `task`, but a\.jsonl"):
        tokenize(DataConfig.parse(config), smollm2_tokenizer)


def test_cut_and_dropped_rows_are_counted(tmp_path, plain_tokenizer):
    rows = [
        {"prompt": "a", "completion": "b"},  # a b </s>
        {"prompt": "a", "completion": "bbbbbbbbb"},
        {"prompt": "a b c d e f g h", "completion": "b"},
    ]
    config = {"train": [write(tmp_path / "a.jsonl", rows)], "max_length": 4}
    result = tokenize(DataConfig.parse(config), plain_tokenizer)
    assert result.train_counts == Counts(
        rows=3, examples=2, truncated=1, dropped=1, tokens=7, supervised=5
    )
    (part,) = result.train_parts
    assert part.counts == result.train_counts
    assert (part.source, part.drawn) == (DataSource.parse(config["train"][0]), 2)
    # before the cut, that of the row left out among them
    assert part.lengths == {3: 1, 11: 1, len(plain_tokenizer("a b c d e f g hb</s>").input_ids): 1}
    short, cut = result.train["labels"][:]
    assert short[-1] == plain_tokenizer.eos_token_id
    assert len(cut) == 4
    assert cut[-1] not in (IGNORED, plain_tokenizer.eos_token_id)


def test_counts_of_all_sources_add_up(tmp_path, plain_tokenizer):
    files = [write(tmp_path / "a.jsonl", pairs(1, 2)), write(tmp_path / "b.jsonl", pairs(3))]
    result = tokenize(DataConfig.parse({"train": files, "eval": files[1:]}), plain_tokenizer)
    assert [part.counts.rows for part in result.train_parts] == [2, 1]
    assert [sum(part.lengths.values()) for part in result.train_parts] == [2, 1]
    first, second = (part.counts for part in result.train_parts)
    assert result.train_counts == first + second
    assert result.train_counts.tokens == sum(map(len, result.train["input_ids"]))
    assert [(part.counts, part.drawn) for part in result.eval_parts] == [(result.eval_counts, 1)]


def test_nothing_left_below_max_length_is_refused(tmp_path, plain_tokenizer):
    config = {"train": [write(tmp_path / "a.jsonl", pairs(1, 2))], "max_length": 2}
    with pytest.raises(DataError, match=r"max_length cuts all 2 rows of .*a\.jsonl .*Raise max_"):
        tokenize(DataConfig.parse(config), plain_tokenizer)


def test_thinking_template_gives_more_examples_than_rows(tmp_path, qwen3_tokenizer):
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"say {n}"} for n, role in enumerate(roles)]
    config = {"train": [write(tmp_path / "a.jsonl", [{"messages": messages}])]}
    counts = tokenize(DataConfig.parse(config), qwen3_tokenizer).train_counts
    assert (counts.rows, counts.examples) == (1, 2)

"""Rows of files: what is read as it stands, and what is refused by file, place, rule and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from molora.config.data import DataConfig, DataSource
from molora.data import Row, read
from molora.errors import ConfigError, DataError

PAIR = {"prompt": "a", "completion": "b"}


def write(path: Path, rows: list[Any]) -> Path:
    """The rows as JSONL, JSON, parquet or CSV, by the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows_of(path: Path, **source: Any) -> list[Row]:
    return list(read(DataSource(path=path, **source)))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    numbers = {"task_types": 1, "cluster_ids": 15, "expert_labels": 3}
    rows = [
        {"prompt": "01", "completion": "NA", "task": "x", **numbers},
        {"prompt": "2024-01-01", "completion": "null", "task": "y", **numbers, "task_types": 0},
    ]
    read_rows = rows_of(write(tmp_path / f"train.{suffix}", rows))
    assert [{name: getattr(row, name) for name in rows[0]} for row in read_rows] == rows
    assert read_rows[1].where.startswith(f"train.{suffix}, ")
    assert read_rows[1].where.endswith(" 2")


def test_json_suffix_with_one_object_a_line_is_jsonl(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('\n{"text": "one"}\n\n{"text": "two"}\n')
    assert [(row.text, row.where) for row in rows_of(path)] == [
        ("one", "train.json, line 2"),
        ("two", "train.json, line 4"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"text": "é"}'), ("a.json", '[{"text": "é"}]'), ("a.csv", "text\né\n")],
)
def test_byte_order_mark_is_not_part_of_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    assert [row.text for row in rows_of(tmp_path / name)] == ["é"]


def test_format_can_be_said_where_the_suffix_says_nothing(tmp_path):
    path = write(tmp_path / "train.jsonl", [PAIR]).rename(tmp_path / "train.txt")
    assert rows_of(path, format="jsonl")[0].completion == "b"
    with pytest.raises(DataError, match=r"train\.txt has no known suffix .* set `format`"):
        rows_of(path)


def test_messages_lose_the_nulls_that_parquet_adds(tmp_path):
    said = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "", "tool_calls": None, "name": "bot"}
    rows = [{"messages": [said, {**answer, "content": "hello"}], "text": None}]
    (row,) = rows_of(write(tmp_path / "a.parquet", rows))
    assert row.messages == [said, {"role": "assistant", "content": "hello", "name": "bot"}]


def test_source_settings_go_before_columns(tmp_path):
    columns = {"task": "column", "task_types": 3, "cluster_ids": 4}
    path = write(tmp_path / "a.jsonl", [{**PAIR, **columns}] * 5)
    rows = rows_of(path, task="source", task_types=0, cluster_ids=0, rows=2)
    assert [(row.task, row.task_types, row.cluster_ids) for row in rows] == [("source", 0, 0)] * 2


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_columns_are_found_under_the_names_that_the_source_has_for_them(tmp_path, suffix):
    rows = [{"question": "a", "answer": "b", "cluster": 3, "text": "not read", "task_types": 1}]
    path = write(tmp_path / f"a.{suffix}", rows)
    names = {"prompt": "question", "completion": "answer", "cluster_ids": "cluster"}
    (row,) = rows_of(path, columns=names)
    assert (row.prompt, row.completion, row.cluster_ids) == ("a", "b", 3)
    assert (row.text, row.task_types) == (None, None)
    message = r"row 1: `columns` says that `prompt` is called 'q', but .* are: question, answer, "
    with pytest.raises(DataError, match=message.replace("row", "(row|line)")):
        rows_of(path, columns={**names, "prompt": "q"})


def test_columns_choose_between_two_forms(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": "hi", "messages": messages}])
    assert rows_of(path, columns={"messages": "messages"})[0].messages == messages
    with pytest.raises(DataError, match="needs one of"):
        rows_of(path)


def test_choices_and_label_are_kept_for_scoring(tmp_path):
    row = {**PAIR, "choices": ["b", "c"], "label": "b"}
    (read_row, without) = rows_of(write(tmp_path / "a.jsonl", [row, {**PAIR, "label": 3}]))
    assert (read_row.choices, read_row.label) == (("b", "c"), "b")
    assert (without.choices, without.label) == (None, None)


def test_directory_needs_a_split_that_names_one_file(tmp_path):
    write(tmp_path / "train.jsonl", [PAIR])
    write(tmp_path / "test.jsonl", [{"text": "held out"}])
    assert rows_of(tmp_path, split="test")[0].text == "held out"
    with pytest.raises(DataError, match=r"is a directory: set `split`.*test\.jsonl, train\.jsonl"):
        rows_of(tmp_path)
    with pytest.raises(DataError, match=r"split='dev' must be .* 0 fit\. Files in it: test"):
        rows_of(tmp_path, split="dev")
    with pytest.raises(DataError, match=r"split='train' chooses a file in a directory"):
        rows_of(tmp_path / "train.jsonl", split="train")


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", [PAIR])
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist\. In .*: train\.jsonl\."):
        rows_of(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"Its directory .*nowhere does not exist either"):
        rows_of(tmp_path / "nowhere" / "train.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl has no rows"),
        ("a.jsonl", b'{"text": "x"}\n{"text": oops}\n', r"a\.jsonl, line 2: not JSON \(Expecting"),
        ("a.json", b'[{"text": "x"},]', r"a\.json, line 1: not JSON .*jsonl"),
        ("b.json", b"[]", r"b\.json has no rows"),
        ("c.json", b'"x"', r"c\.json holds a str; it must hold a list"),
        ("a.csv", b"prompt,completion\na,b\na,b,c\n", r"a\.csv, row 2: its number of cells"),
        ("a.csv", b"prompt,completion\n", r"a\.csv has no rows"),
        ("a.parquet", b"PAR", r"a\.parquet is not a parquet file"),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), r"a\.jsonl is not UTF-8 .*Convert"),
    ],
)
def test_broken_file_is_refused_by_name_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name)


USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], r"a row is an object with named columns, not \['a'\]"),
        ({"question": "a"}, r"needs one of `messages`, .*; its columns: question\."),
        ({}, r"its columns: none\."),
        ({**PAIR, "text": "x"}, r"needs one of .*; its columns: prompt, completion, text\."),
        ({"prompt": "a"}, r"`prompt` needs a `completion`; the row's columns: prompt\."),
        ({"prompt": "a", "completion": None}, r"`prompt` needs a `completion`"),
        ({"prompt": "a", "completion": " \n"}, r"`completion` is empty\. Remove the row"),
        ({"prompt": "a", "completion": 5}, r"`completion` must be a string, not 5\."),
        ({"text": ["x"]}, r"`text` must be a string, not \['x'\]"),
        ({"messages": "hi"}, r"`messages` must be a list of messages, not 'hi'"),
        ({"messages": []}, r"`messages` must be a list"),
        ({"messages": [USER, "hello"]}, r"message 2 needs `role` and `content`, but is 'hello'"),
        ({"messages": [USER, {"role": "assistant"}]}, r"message 2: `content` must be a string"),
        ({"messages": [USER, {**BOT, "content": " "}]}, r"message 2: the assistant's .* is empty"),
        ({"messages": [USER]}, r"no message has the role `assistant` \(roles: user\)"),
        ({"messages": [BOT]}, r"message 1 is the assistant's; put a user's"),
        ({**PAIR, "tools": [{"name": "f"}]}, r"`tools` are not rendered"),
        ({**PAIR, "task": 3}, r"`task` must be a name, not 3"),
        ({**PAIR, "task_types": True}, r"`task_types` must be a whole number .* not True"),
        ({**PAIR, "task_types": -1}, r"`task_types` must be a whole number .* not -1"),
        ({**PAIR, "cluster_ids": 1.0}, r"`cluster_ids` must be a whole number .* not 1\.0"),
        ({**PAIR, "cluster_ids": "1"}, r"`cluster_ids` must be a whole number .* not '1'"),
        ({**PAIR, "choices": "ab"}, r"`choices` must be a list of non-empty strings"),
        ({**PAIR, "choices": ["b", "b"], "label": "b"}, r"two or more different strings"),
        ({**PAIR, "choices": ["b", "c"], "label": "d"}, r"`label` must be one of .* not 'd'"),
        ({**PAIR, "choices": ["b", "c"]}, r"`label` must be one of .* not None"),
    ],
)
def test_faulty_row_is_refused_by_line(tmp_path, row, message):
    path = write(tmp_path / "train.jsonl", [PAIR, row])
    with pytest.raises(DataError, match=rf"^train\.jsonl, line 2: (.* )?{message}"):
        rows_of(path)


def test_a_path_is_short_for_a_source():
    config = DataConfig.parse({"train": ["a.jsonl", {"path": "b", "split": "train"}]})
    assert config.train == (DataSource(path="a.jsonl"), DataSource(path="b", split="train"))
    assert config.eval == ()
    kinds = DataConfig.model_json_schema()["$defs"]["DataSource"]["anyOf"]
    assert [kind.get("type") for kind in kinds] == ["string", "object"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train": []}, r"train: .*at least 1 item"),
        ({"train": [{"pth": "a"}]}, r"train\.0: unknown key 'pth'\. Close names: path"),
        ({"train": ["a"], "max_length": 1}, r"max_length: .*greater than or equal to 2"),
        ({"train": ["a"], "chat_template": "chatml"}, r"chat_template: .*'auto' or 'none'"),
        ({"train": [{"path": "a", "format": "tsv"}]}, r"train\.0\.format: "),
    ],
)
def test_faulty_config_is_refused_by_path(config, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig.parse(config)

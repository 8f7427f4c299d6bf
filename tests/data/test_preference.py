"""Preferences: the three forms of a row, the tokens of a pair, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from molora.config.data import DataConfig, DataSource
from molora.data import IGNORED, Counts, RowEncoder, tokenize
from molora.data.preference import PairEncoder, to_compare, tokenize_pairs
from molora.data.read import read
from molora.data.rows import Row
from molora.errors import DataError

GOOD, BAD = "It is Paris.", "I do not know\n\nit at all."


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


ASKED = [user("What is the capital of France?")]
TURNS = [user("Add two numbers"), assistant("def add(a, b):\n    return a + b"), user("And?\n\n")]
STRINGS = {"prompt": ASKED[0]["content"], "chosen": GOOD, "rejected": BAD}
MESSAGES = {"prompt": ASKED, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
WHOLE = {"chosen": [*ASKED, assistant(GOOD)], "rejected": [*ASKED, assistant(BAD)]}


def row(fields: dict[str, Any]) -> Row:
    return Row(where="pairs.jsonl, line 1", **to_compare(fields, "pairs.jsonl, line 1"))


def pair(tokenizer: Any, fields: dict[str, Any], **options: Any) -> Any:
    (found,) = PairEncoder(tokenizer, **{"chat_template": "auto", **options})(row(fields))
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------- tokens


def test_the_three_forms_say_the_same(family):
    expected = pair(family.tokenizer, STRINGS)
    assert pair(family.tokenizer, MESSAGES) == expected
    assert pair(family.tokenizer, WHOLE) == expected
    # as published data sets have it: the first message again, beside the conversations
    assert pair(family.tokenizer, {**WHOLE, "prompt": ASKED[0]["content"]}) == expected
    assert expected.chosen_ids != expected.rejected_ids


@pytest.mark.parametrize("before", [ASKED, TURNS], ids=["one_turn", "several_turns"])
def test_a_pair_is_what_the_model_gets_and_what_it_must_write(family, before):
    tokenizer = family.tokenizer
    found = pair(tokenizer, {**MESSAGES, "prompt": before})
    text = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(found.prompt_ids) == tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    encoder = RowEncoder(tokenizer)
    for ids, answer in ((found.chosen_ids, GOOD), (found.rejected_ids, BAD)):
        assert ids[-1] == encoder.stop_id
        assert tokenizer.decode(ids[:-1]).strip() == answer
        # and the same tokens as in supervised training on the same conversation
        example = encoder(Row(where="", messages=[*before, assistant(answer)]))[-1]
        whole = found.prompt_ids + ids
        assert example.input_ids[: len(whole)] == whole
        assert example.labels[len(whole) - len(ids) : len(whole)] == ids
        assert set(example.labels[len(whole) :]) <= {IGNORED}


def test_where_earlier_turns_are_written_differently_the_prompt_is_the_one_at_inference(
    qwen3_tokenizer,
):
    found = pair(qwen3_tokenizer, {**MESSAGES, "prompt": TURNS})
    text = qwen3_tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert qwen3_tokenizer.decode(found.prompt_ids) == text
    assert qwen3_tokenizer.decode(found.chosen_ids) == (f"<think>\n\n</think>\n\n{GOOD}<|im_end|>")


def test_without_a_template_answers_follow_the_prompt_and_end_with_eos(plain_tokenizer):
    found = pair(plain_tokenizer, STRINGS)
    eos = plain_tokenizer.eos_token_id
    assert plain_tokenizer.decode(found.prompt_ids) == STRINGS["prompt"]
    for ids, answer in ((found.chosen_ids, GOOD), (found.rejected_ids, BAD)):
        assert plain_tokenizer.decode(ids[:-1]) == answer
        assert ids[-1] == eos
    with pytest.raises(DataError, match="`messages` need a chat template"):
        pair(plain_tokenizer, MESSAGES)


def test_a_pair_is_cut_at_the_end_and_counted(smollm2_tokenizer):
    whole = pair(smollm2_tokenizer, STRINGS)
    prompt, chosen, rejected = map(len, whole.columns)
    assert (whole.truncated, whole.length) == (False, prompt + rejected)
    assert whole.tokens == 2 * prompt + chosen + rejected
    assert whole.supervised == chosen + rejected

    cut = pair(smollm2_tokenizer, STRINGS, max_length=prompt + chosen)
    assert chosen < rejected
    assert cut.columns == (whole.prompt_ids, whole.chosen_ids, whole.rejected_ids[:chosen])
    assert (cut.truncated, cut.length) == (True, whole.length)
    assert cut.supervised == 2 * chosen

    for limit in (prompt, prompt - 3):
        assert pair(smollm2_tokenizer, STRINGS, max_length=limit).supervised == 0


def test_answers_that_do_not_differ_after_the_cut_are_no_preference(smollm2_tokenizer):
    same = {**STRINGS, "rejected": GOOD + " Or so."}
    whole = pair(smollm2_tokenizer, same)
    shared = next(
        i
        for i, (a, b) in enumerate(zip(whole.chosen_ids, whole.rejected_ids, strict=False))
        if a != b
    )
    for beyond, left in ((0, False), (1, True)):
        limit = len(whole.prompt_ids) + shared + beyond
        assert bool(pair(smollm2_tokenizer, same, max_length=limit).supervised) is left
    assert pair(smollm2_tokenizer, {**STRINGS, "rejected": GOOD}).supervised == 0


# ---------------------------------------------------------------------- data sets


def test_data_sets_have_trls_columns_and_the_mixtures(tmp_path, smollm2_tokenizer):
    rows = [
        {**STRINGS, "task": "b", "task_types": 1},
        {**MESSAGES, "task": "a", "task_types": 0},
        {**STRINGS, "rejected": GOOD, "task": "a", "task_types": 0},
    ]
    config = {"train": [write(tmp_path / "pairs.jsonl", rows)]}
    config["eval"] = [{"path": config["train"][0], "rows": 1}]
    result = tokenize_pairs(DataConfig.parse(config), smollm2_tokenizer)
    expected = pair(smollm2_tokenizer, STRINGS)
    assert sorted(result.train.column_names) == [
        *("chosen_ids", "prompt_ids", "rejected_ids"),
        *("task_ids", "task_types"),
    ]
    for name, ids in zip(PairEncoder.COLUMNS, expected.columns, strict=True):
        assert result.train[name][:] == [ids, ids]
    assert result.train["task_ids"][:] == [1, 0]
    assert result.train["task_types"][:] == [1, 0]
    assert result.train_counts == Counts(
        rows=3,
        examples=2,
        truncated=0,
        dropped=1,
        tokens=2 * expected.tokens,
        supervised=2 * expected.supervised,
    )
    assert result.eval is not None
    assert len(result.eval) == 1


@pytest.mark.parametrize("form", [STRINGS, MESSAGES, WHOLE], ids=["strings", "messages", "whole"])
def test_every_format_and_name_of_columns_gives_the_same_pair(tmp_path, form, smollm2_tokenizer):
    renamed = {f"my_{name}": value for name, value in form.items()}
    # parquet fills the gaps of nested columns with nulls
    table = pyarrow.Table.from_pylist([renamed])
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    columns = {name: f"my_{name}" for name in form}
    source = DataSource(path=tmp_path / "pairs.parquet", columns=columns)
    (found,) = read(source, to_compare)
    encoded = PairEncoder(smollm2_tokenizer, chat_template="auto")(found)
    assert encoded == [pair(smollm2_tokenizer, form)]


def test_nothing_to_prefer_at_all_is_an_error(tmp_path, smollm2_tokenizer):
    path = write(tmp_path / "pairs.jsonl", [{**STRINGS, "rejected": GOOD}] * 2)
    with pytest.raises(DataError, match="or of pairs before the answers differ"):
        tokenize_pairs(DataConfig.parse({"train": [path]}), smollm2_tokenizer)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "needs `chosen` and `rejected`.*prompt, completion"),
        ({"prompt": "a", "chosen": "b"}, "needs `chosen` and `rejected`"),
        ({"chosen": "a", "rejected": "b"}, "must all be.*`prompt`: None"),
        ({**STRINGS, "chosen": [assistant("b")]}, "must all be"),
        ({**STRINGS, "rejected": " "}, "`rejected` is empty"),
        ({**STRINGS, "prompt": ASKED}, "must all be"),
        ({**WHOLE, "prompt": 3}, "`prompt` must be a string or messages, not 3"),
        ({**WHOLE, "chosen": {"role": "assistant"}}, "`chosen` must be a string or messages"),
        ({**MESSAGES, "chosen": [user("b")]}, "`chosen`: nothing to learn"),
        (
            {**MESSAGES, "prompt": TURNS, "rejected": [user("b")]},
            "`rejected` must end with a message of the assistant",
        ),
        ({**MESSAGES, "chosen": [{"role": "assistant"}]}, "`chosen`: message 2: `content` must"),
        ({**WHOLE, "rejected": [user("other"), assistant(BAD)]}, "differ in their last message"),
        ({**WHOLE, "prompt": "another"}, "`prompt` .'another'. is no message of"),
        ({**MESSAGES, "prompt": [*ASKED, assistant("Well.")]}, "must not follow another of"),
        ({**MESSAGES, "prompt": []}, "message 1 is the assistant's"),
        ({**STRINGS, "tools": [{}]}, "`tools` are not rendered"),
    ],
)
def test_a_row_of_no_form_is_named_with_its_rule(fields, message):
    with pytest.raises(DataError, match=rf"pairs\.jsonl, line 1.*{message}"):
        row(fields)


def test_each_kind_of_training_says_that_it_needs_the_other_rows(tmp_path, smollm2_tokenizer):
    preferences = DataConfig.parse({"train": [write(tmp_path / "p.jsonl", [STRINGS])]})
    with pytest.raises(DataError, match=r"p\.jsonl, line 1: .*Set train\.objective: dpo"):
        tokenize(preferences, smollm2_tokenizer)
    answers = {"train": [write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])]}
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: a preference needs `chosen`"):
        tokenize_pairs(DataConfig.parse(answers), smollm2_tokenizer)
    with pytest.raises(DataError, match="a preference has a prompt"):
        PairEncoder(smollm2_tokenizer, chat_template="auto")(Row(where="x", prompt="a"))

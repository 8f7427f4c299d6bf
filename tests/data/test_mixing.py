"""Shares of sources: exact counts, what is drawn, and that it hangs on nothing but the seed."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora.config.data import DataConfig
from molora.data import tokenize
from molora.data.mixing import drawn_per_epoch, epoch_indices, largest_remainder
from molora.errors import ConfigError, DataError


def config(*weights: float | None, **settings: Any) -> DataConfig:
    sources = [{"path": f"{i}.jsonl", "weight": weight} for i, weight in enumerate(weights)]
    return DataConfig.parse({"train": sources, **settings})


def test_without_weights_and_temperature_every_example_comes_once():
    assert drawn_per_epoch(config(None, None), [3, 70]) == [3, 70]


@pytest.mark.parametrize(
    ("weights", "sizes", "expected"),
    [
        ((1, 1), [90, 10], [50, 50]),
        ((3, 1), [90, 10], [75, 25]),
        ((0.3, 0.1), [90, 10], [75, 25]),  # relative: no need to sum to one
        ((1, 1, 1), [5, 3, 2], [4, 3, 3]),  # 3⅓ each; of equal remainders the first goes up
        ((2, 3, 5), [1, 1, 5], [1, 2, 4]),  # 1.4, 2.1, 3.5
        ((7,), [4], [4]),
    ],
)
def test_counts_by_weight(weights, sizes, expected):
    assert drawn_per_epoch(config(*weights), sizes) == expected


@pytest.mark.parametrize(
    ("temperature", "sizes", "expected"),
    [
        (1, [1, 10, 89], [1, 10, 89]),
        (2, [1, 9, 90], [8, 22, 70]),  # 1 : 3 : 9.4868 of 100 = 7.41, 22.24, 70.34
        (3, [8, 27, 65], [22, 33, 45]),  # 2 : 3 : 4.0207 = 22.17, 33.25, 44.57
        (1e9, [8, 27, 65], [33, 33, 34]),  # even, but for the ninth digit
        (2, [0, 4], [0, 4]),  # nothing has a share of nothing
    ],
)
def test_counts_by_temperature(temperature, sizes, expected):
    found = drawn_per_epoch(config(*[None] * len(sizes), temperature=temperature), sizes)
    assert found == expected


@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_temperature_one_is_every_example_once(sizes):
    assert drawn_per_epoch(config(*[None] * len(sizes), temperature=1), sizes) == sizes


@given(
    shares=st.lists(st.fractions(Fraction(1, 1000), 1000), min_size=1, max_size=10),
    total=st.integers(0, 10**6),
)
def test_largest_remainder_sums_up_and_is_less_than_one_off(shares, total):
    counts = largest_remainder(shares, total)
    assert sum(counts) == total
    quotas = [total * share / sum(shares) for share in shares]
    assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))


@given(
    sources=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 100)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_no_example_comes_twice_before_all_others_of_its_source_came_once(sources, seed):
    sizes, counts = zip(*sources, strict=True)
    found = epoch_indices(sizes, counts, seed).tolist()
    start = 0
    for size, count in sources:
        times = Counter(index for index in found if start <= index < start + size)
        assert sum(times.values()) == count
        assert {times[index] for index in range(start, start + size)} <= {
            count // size,
            -(-count // size),
        }
        start += size
    assert len(found) == sum(counts)


def test_the_draw_hangs_on_the_seed_alone():
    first = epoch_indices([50, 50], [20, 80], seed=0)
    assert first.tolist() == epoch_indices([50, 50], [20, 80], seed=0).tolist()
    assert first.tolist() != epoch_indices([50, 50], [20, 80], seed=1).tolist()
    # every source's draw is its own: not the same places of both
    low, high = first[:20], first[first >= 50]
    extra = [place - 50 for place, times in Counter(high.tolist()).items() if times == 2]
    assert len(extra) == 30
    assert set(low.tolist()) - set(extra)


def test_source_without_a_share_is_refused():
    with pytest.raises(DataError, match=r"1\.jsonl has 9 examples .* get 0 of the 10 .*1e-05\. R"):
        drawn_per_epoch(config(1, 1e-5), [1, 9])
    with pytest.raises(DataError, match=r"0\.jsonl has 0 examples .* get 5 of the 10 .* is 0\.5"):
        drawn_per_epoch(config(1, 1), [0, 10])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"train": [{"path": "a", "weight": 1}, "b"]},
            r"a has a weight, but b has none\. Give one to every source",
        ),
        (
            {"train": [{"path": "a", "weight": 2}], "temperature": 3},
            r"temperature=3\.0 and weight=2\.0 on a both set the shares",
        ),
        (
            {"train": ["a"], "eval": ["b", {"path": "c", "weight": 2}]},
            r"eval\.1 \(c\) has weight=2\.0, but evaluation reads every row once",
        ),
        ({"train": [{"path": "a", "weight": 0}]}, r"train\.0\.weight: .*greater than 0"),
        ({"train": ["a"], "temperature": 0.5}, r"temperature: .*greater than or equal to 1"),
    ],
)
def test_contradictory_shares_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig.parse(data)


# ---- from files to a data set ----


def write(path: Path, count: int, **columns: Any) -> str:
    rows = [{"text": f"{path.stem} {number}", **columns} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def mixed(tmp_path: Path) -> DataConfig:
    big, small = write(tmp_path / "big.jsonl", 18), write(tmp_path / "small.jsonl", 6)
    sources = [{"path": big, "task": "b", "weight": 1}, {"path": small, "task": "s", "weight": 3}]
    return DataConfig.parse({"train": sources, "eval": [{"path": small, "task": "s"}]})


def test_an_epoch_holds_the_shares_and_its_side_columns_go_along(mixed, plain_tokenizer):
    result = tokenize(mixed, plain_tokenizer, seed=4)

    texts = [plain_tokenizer.decode(ids) for ids in result.train["input_ids"]]
    times = Counter(text.removesuffix("</s>") for text in texts)
    assert len(texts) == 24
    assert {times[f"small {number}"] for number in range(6)} == {3}
    assert [times[f"big {number}"] for number in range(18)].count(1) == 6
    assert all(
        text.startswith({"b": "big", "s": "small"}[result.tasks[task]])
        for text, task in zip(texts, result.train["task_ids"], strict=True)
    )
    assert [part.drawn for part in result.train_parts] == [6, 18]
    assert [part.counts.examples for part in result.train_parts] == [18, 6]
    assert result.train_counts.examples == 24
    # evaluation reads every row once
    assert len(result.eval) == 6


def test_a_data_set_is_the_same_again_and_another_with_another_seed(mixed, plain_tokenizer):
    first, again, other = (
        tokenize(mixed, plain_tokenizer, seed=seed).train["input_ids"][:] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len(first) == len(other)
    unmixed = DataConfig.parse({"train": [{"path": s.path, "task": s.task} for s in mixed.train]})
    plain = [tokenize(unmixed, plain_tokenizer, seed=seed).train["input_ids"][:] for seed in (0, 1)]
    assert plain[0] == plain[1]


def test_shares_count_the_examples_that_are_left(tmp_path, plain_tokenizer):
    rows = [{"prompt": "a", "completion": "b"}] * 4 + [{"prompt": "a b c d e f", "completion": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 1}] * 2
    result = tokenize(DataConfig.parse({"train": sources, "max_length": 4}), plain_tokenizer)
    assert [part.counts.dropped for part in result.train_parts] == [1, 1]
    assert [part.drawn for part in result.train_parts] == [4, 4]

"""Sequences into bins and bins into batches: nothing lost, nothing cut, nothing mixed up."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from molora.config.data import DataConfig
from molora.data import Collator, pack, packing_rates, per_sequence, tokenize
from molora.data import packing as packing_module
from molora.data.packing import best_fit
from molora.errors import DataError

EOS = 2


def dataset(lengths: list[int], **columns: list[int]) -> Dataset:
    """Rows that can be told apart: row n holds 100 n + 10, 100 n + 11, …; the first has no
    label."""
    ids = [[100 * n + 10 + t for t in range(length)] for n, length in enumerate(lengths)]
    tokens = List(Value("int32"))
    features = {"input_ids": tokens, "labels": tokens} | {name: Value("int64") for name in columns}
    labels = [[-100, *row[1:]] for row in ids]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": labels, **columns}, features=Features(features)
    )


def fewest_bins(lengths: list[int], width: int) -> int:
    """By trying everything."""
    best = len(lengths)

    def place(number: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if number == len(lengths):
            best = len(rooms)
            return
        for i, room in enumerate(rooms):
            if room >= lengths[number]:
                place(number + 1, [*rooms[:i], room - lengths[number], *rooms[i + 1 :]])
        place(number + 1, [*rooms, width - lengths[number]])

    place(0, [])
    return best


@given(
    lengths=st.lists(st.integers(1, 12), max_size=9),
    width=st.integers(12, 20),
)
def test_bins_hold_every_sequence_once_none_overflows_and_they_are_about_the_fewest(
    lengths: list[int], width: int
) -> None:
    bins = best_fit(lengths, width)
    assert sorted(number for members in bins for number in members) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in members) <= width for members in bins)
    # in order, inside and outside
    assert all(members == sorted(members) for members in bins)
    assert bins == sorted(bins)
    if lengths:
        fewest = fewest_bins(lengths, width)
        assert fewest <= len(bins) <= 11 * fewest // 9 + 1


def test_the_longest_goes_first_and_into_the_fullest_bin_with_room() -> None:
    # 7 and 6 leave rooms of 3 and 4: both have room for the first 3, which goes to the 7
    assert best_fit([7, 6, 3, 3, 1], 10) == [[0, 2], [1, 3, 4]]
    # in the order given this would take three bins
    assert best_fit([3, 3, 7, 7], 10) == [[0, 3], [1, 2]]


def test_bins_of_many_sequences_are_full_and_made_in_a_moment() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 300) for _ in range(50_000)]
    rates = packing_rates(lengths, 1024)
    assert rates.sequences == 50_000
    assert rates.tokens == sum(lengths)
    assert rates.fill > 99.9
    assert rates.fill == 100 * sum(lengths) / (rates.bins * 1024)
    assert rates.sequences_per_bin == 50_000 / rates.bins
    # one sequence a row, which is what batches without packing hold before padding
    assert packing_rates([1000] * 3, 1024).fill < 98


@pytest.mark.parametrize(("lengths", "fault"), [([3, 9], "sequence 1 has 9"), ([0], "has 0 tok")])
def test_what_does_not_fit_a_bin_is_refused(lengths: list[int], fault: str) -> None:
    with pytest.raises(DataError, match=rf"{fault}.*holds 1 to 8.*Cut sequences to max_length"):
        best_fit(lengths, 8)


@pytest.mark.parametrize("chunk", [10_000, 2])
def test_packed_rows_are_the_rows_one_after_the_other(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "_CHUNK", chunk)
    lengths = [3, 8, 2, 4, 1, 6]
    rows = dataset(lengths, task_ids=[5, 6, 7, 8, 9, 0], task_types=[0, 1, 0, 1, 0, 1])
    packed = pack(rows, 8)
    bins = best_fit(lengths, 8)
    assert len(packed) == len(bins) == 3
    for row, members in zip(packed, bins, strict=True):
        for name in ("input_ids", "labels", "task_ids", "task_types"):
            assert row[name] == [rows[n][name] for n in members]
    assert pack(rows, 8)[:] == packed[:]
    assert {len(members) for members in bins} > {1}
    # a data set that is a view of another, in another order
    assert pack(rows.select([4, 2, 0]), 8)["input_ids"][:] == [[[410], [210, 211], [10, 11, 12]]]


def test_a_packed_data_set_is_not_packed_again() -> None:
    with pytest.raises(DataError, match=r"packed already: its `input_ids` are lists of"):
        pack(pack(dataset([1, 2]), 8), 8)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_of_packed_rows_restarts_positions_and_numbers_segments(side: Any) -> None:
    packed = pack(dataset([3, 2, 4, 1], task_types=[4, 5, 6, 7]), 6)
    assert per_sequence(packed, "task_types") == [4, 7, 5, 6]
    batch = Collator(EOS, padding_side=side)(list(packed))
    in_torch = Collator(EOS, padding_side=side)(list(packed.with_format("torch")))
    assert all(torch.equal(in_torch[name], batch[name]) for name in batch)
    sequences = [[10, 11, 12, 310], [110, 111, 210, 211, 212, 213]]
    padding: dict[str, list[int]] = {
        "input_ids": [EOS, EOS],
        "labels": [-100, -100],
        "position_ids": [0, 1],
        "segment_ids": [0, 0],
    }
    expected = {
        "input_ids": sequences,
        # 110 and 310 begin sequences: what comes before them must not predict them
        "labels": [[-100, 11, 12, -100], [-100, 111, -100, 211, 212, 213]],
        "position_ids": [[0, 1, 2, 0], [0, 1, 0, 1, 2, 3]],
        "segment_ids": [[1, 1, 1, 2], [1, 1, 2, 2, 2, 2]],
    }
    for name, (short, long) in expected.items():
        whole = [*short, *padding[name]] if side == "right" else [*padding[name], *short]
        assert batch[name].tolist() == [whole, long], name
    # one value per sequence of the batch, in order
    assert batch["task_types"].tolist() == [4, 7, 5, 6]
    assert set(batch) == {*expected, "task_types"}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_label_on_the_first_token_of_a_sequence_is_taken_off() -> None:
    two = {"input_ids": [[3, 4], [5, 6]], "labels": [[3, 4], [5, 6]]}
    assert Collator(EOS)([two])["labels"].tolist() == [[-100, 4, -100, 6]]
    one = {"input_ids": [[3, 4, 5, 6]], "labels": [[3, 4, 5, 6]]}
    assert Collator(EOS)([one])["labels"].tolist() == [[-100, 4, 5, 6]]


def test_batches_of_packed_and_other_rows_are_refused() -> None:
    row = {"input_ids": [3, 4], "labels": [3, 4]}
    with pytest.raises(DataError, match=r"1 of 2 examples of a batch are packed"):
        Collator(EOS)([row, {"input_ids": [[3], [4]], "labels": [[3], [4]]}])


def test_a_config_packs_what_is_trained_on_and_nothing_else(tmp_path: Any, smollm2_tokenizer: Any):
    numbers = range(1, 10)
    rows = [{"prompt": f"say {n}", "completion": "so " * n, "task": "t"} for n in numbers]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {"train": [str(path)], "eval": [str(path)], "max_length": 128}
    plain = tokenize(DataConfig.parse(config), smollm2_tokenizer)
    found = tokenize(DataConfig.parse({**config, "packing": True}), smollm2_tokenizer)
    assert plain.packing is None
    assert found.train[:] == pack(plain.train, 128)[:]
    assert len(found.train) < len(plain.train) == 9
    assert found.eval[:] == plain.eval[:]
    assert found.train_counts == plain.train_counts
    assert found.packing == packing_rates([len(ids) for ids in plain.train["input_ids"]], 128)
    assert found.packing.tokens == found.train_counts.tokens

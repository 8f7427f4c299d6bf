"""Data sets by name: directories that `datasets` reads, and the hub's cache while offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from molora.config.data import DataConfig, DataSource
from molora.data import read
from molora.errors import ConfigError, DataError

PAIRS = {"prompt": ["01", "2024-01-01", "c"], "completion": ["x", "y", "z"]}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A directory as the hub has them: one file per split."""
    directory = tmp_path / "pairs"
    directory.mkdir()
    Dataset.from_dict(PAIRS).to_parquet(directory / "train.parquet")
    Dataset.from_dict({"prompt": ["held out"], "completion": ["w"]}).to_parquet(
        directory / "test.parquet"
    )
    return directory


@pytest.fixture
def hub(parquet: Path, tmp_path: Path) -> str:
    """The name of a data set of the hub that lies in the cache, as a download leaves it there."""
    (parquet / "test.parquet").unlink()
    load_dataset(str(parquet), split="train")
    (made,) = (file.parent for file in (tmp_path / "cache").rglob("dataset_info.json"))
    cached = tmp_path / "cache" / "owner___pairs" / "default" / "0.0.0" / COMMIT
    shutil.copytree(made, cached)
    info = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default"}))
    return "owner/pairs"


def prompts(**source: Any) -> list[tuple[str | None, str]]:
    return [(row.prompt, row.where) for row in read(DataSource(**source))]


def test_directory_of_parquet_files_by_split(parquet):
    assert prompts(name=str(parquet), split="train") == [
        ("01", f"{parquet}[train], row 1"),
        ("2024-01-01", f"{parquet}[train], row 2"),
        ("c", f"{parquet}[train], row 3"),
    ]
    assert [text for text, _ in prompts(name=str(parquet), split="test")] == ["held out"]
    first = prompts(name=str(parquet), split="train", rows=2)
    last = prompts(name=str(parquet), split="train[1:]")
    assert [text for text, _ in first] == PAIRS["prompt"][:2]
    assert [text for text, _ in last] == PAIRS["prompt"][1:]
    with pytest.raises(DataError, match=r"`split` must be one of train, test, not None"):
        prompts(name=str(parquet))


def test_saved_data_sets_with_and_without_splits(tmp_path):
    dataset = Dataset.from_dict(PAIRS)
    dataset.with_format("torch").save_to_disk(tmp_path / "single")
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "splits")

    single, splits = str(tmp_path / "single"), str(tmp_path / "splits")
    assert [text for text, _ in prompts(name=single)] == PAIRS["prompt"]
    assert prompts(name=splits, split="test") == [("01", f"{splits}[test], row 1")]
    with pytest.raises(DataError, match=r"without splits, .* split='train'\. Leave `split` out"):
        prompts(name=single, split="train")
    with pytest.raises(DataError, match=r"`split` must be one of train, test, not 'dev'"):
        prompts(name=splits, split="dev")
    with pytest.raises(DataError, match=r"`split` must be one of train, test, not None"):
        prompts(name=splits)
    with pytest.raises(DataError, match=r"has no `subset`, but the source has subset='main'"):
        prompts(name=splits, split="test", subset="main")


def test_data_set_of_the_hub_comes_out_of_the_cache(hub):
    assert prompts(name=hub, split="train")[1] == ("2024-01-01", "owner/pairs[train], row 2")
    assert prompts(name=hub, subset="default", split="train")[0][1].startswith(
        "owner/pairs/default[train], "
    )
    with pytest.raises(DataError, match=r"`split` must be one of train, not None"):
        prompts(name=hub)
    with pytest.raises(DataError, match=r"pairs\[dev\] cannot be loaded: .*dev.* Give `name` as"):
        prompts(name=hub, split="dev")
    with pytest.raises(DataError, match=r"pairs/other\[train\] cannot be loaded: "):
        prompts(name=hub, subset="other", split="train")


def test_another_revision_than_the_cached_one_is_not_passed_off_for_it(hub):
    assert len(prompts(name=hub, split="train", revision=COMMIT)) == 3
    assert len(prompts(name=hub, split="train", revision=COMMIT[:10])) == 3
    for revision in ("main", "f" * 40, COMMIT[:3]):
        with pytest.raises(DataError, match=rf"revision='{revision}' cannot be .* commit {COMMIT}"):
            prompts(name=hub, split="train", revision=revision)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"name": "owner/nothing", "split": "train"}, r"owner/nothing\[train\] cannot be loaded: "),
        (
            {"name": "owner/nothing", "split": "train", "revision": "v1"},
            r"owner/nothing\[train\] at revision 'v1' cannot be loaded: ",
        ),
        ({"name": "parquet", "split": "train"}, r"name='parquet' is neither owner/dataset"),
        ({"name": "no/such/place", "split": "train"}, r"name='no/such/place' is neither"),
    ],
)
def test_what_is_not_there_is_refused_with_the_remedy(source, message):
    with pytest.raises(DataError, match=message + r"(.|\n)*A file is given by `path`\."):
        prompts(**source)


def test_broken_directories_are_refused(tmp_path, parquet):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty\[train\] cannot be loaded: .*any data files"):
        prompts(name=str(tmp_path / "empty"), split="train")
    (parquet / "train.parquet").write_bytes(b"PAR")
    with pytest.raises(DataError, match=r"pairs\[train\] cannot be loaded: "):
        prompts(name=str(parquet), split="train")


def test_code_in_a_data_set_is_not_run(tmp_path):
    directory = tmp_path / "scripted"
    directory.mkdir()
    (directory / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match=r"scripts are no longer supported"):
        prompts(name=str(directory), split="train")
    assert not (tmp_path / "ran").exists()


def test_faulty_row_is_named_by_its_number(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 1500
    Dataset.from_list([*rows, {"prompt": "a", "completion": " "}]).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"data, row 1501: `completion` is empty"):
        prompts(name=str(tmp_path / "data"))


def test_class_labels_are_numbers_and_no_task_names(tmp_path):
    dataset = Dataset.from_dict({"text": ["a"], "task": [1]})
    labels = dataset.cast_column("task", ClassLabel(names=["x", "y"]))
    labels.save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"row 1: `task` must be a name, not 1"):
        prompts(name=str(tmp_path / "data"))


def test_data_set_without_rows_is_refused(tmp_path, parquet):
    Dataset.from_dict(PAIRS).select([]).to_parquet(parquet / "test.parquet")
    with pytest.raises(DataError, match=r"pairs\[test\] (has no rows|cannot be loaded)"):
        prompts(name=str(parquet), split="test")
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"data (has no rows|cannot be loaded)"):
        prompts(name=str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, r"either `path`, .* or `name`, .*; it has neither"),
        ({"path": "a", "name": "b/c"}, r"it has path='a' and name='b/c'"),
        ({"path": "a", "revision": "main"}, r"`revision` is for data sets .* path='a'"),
        ({"path": "a", "subset": "x"}, r"`subset` is for data sets .* path='a'"),
        ({"name": "b/c", "format": "csv"}, r"format='csv' is for files .* name='b/c'"),
        ({"name": " "}, r"name: "),
        ({"path": "a", "columns": {"promt": "x"}}, r"unknown key 'promt'\. Close names: prompt"),
    ],
)
def test_contradictory_source_is_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig.parse({"train": [source]})

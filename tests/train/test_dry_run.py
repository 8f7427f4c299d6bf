"""What a dry run says is what attaching does; and every configuration in configs/ passes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_rules import heavy_imports_at_start, imports_of, read_sources
from rich.console import Console
from tiny_runs import save_base
from transformers import AutoModelForCausalLM

import molora
from molora.presets import PRESETS
from molora.train.dry_run import describe, dry_run, render

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RunFile = Callable[..., Path]
MOLA = {"preset": "mola", "num_experts": [2, 4], "rank": [3, 5]}
MIXTURES: dict[str, dict[str, Any]] = {
    "mola": MOLA,
    "mixlora": {"preset": "mixlora", "num_experts": 4},
    "two_patterns": {"preset": "lora", "targets": ["q_proj", "attention"]},
    "extras": {**MOLA, "train_modules": ["lm_head"]},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_dry_run_tells_what_attaching_does(name: str, run_file: RunFile, base: Path) -> None:
    config = molora.load_config(run_file(MIXTURES[name]))
    model = AutoModelForCausalLM.from_pretrained(base)
    before = sum(p.numel() for p in model.parameters())
    mixture = molora.attach(model, config.mixture)
    result = dry_run(config)
    assert result == describe(mixture, model=str(base), base_parameters=before)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert result.trainable == trained == sum(result.parameters.values())
    assert result.percent_of_base == pytest.approx(100 * trained / before)
    assert sum(row.parameters for row in result.rows) == result.parameters["experts"]
    assert sum(row.modules for row in result.rows) == len(mixture.built.banks)


def test_the_match_table_by_hand(run_file: RunFile) -> None:
    result = dry_run(molora.load_config(run_file({**MOLA, "targets": ["q_proj", "down_proj"]})))
    query, down = result.rows
    # 32 → 48 and 40 → 32; 2 experts of rank 3 in the first layer, 4 of rank 5 in the second
    assert (query.pattern, query.modules, query.experts, query.rank) == (
        "q_proj",
        2,
        (2, 4),
        (3, 5),
    )
    assert query.parameters == (2 * 3 + 4 * 5) * (32 + 48)
    assert down.parameters == (2 * 3 + 4 * 5) * (40 + 32)
    assert result.parameters["router"] == (2 + 4) * (32 + 40)
    assert result.sites == 4


def test_a_linear_of_two_patterns_is_counted_once(run_file: RunFile) -> None:
    result = dry_run(molora.load_config(run_file(MIXTURES["two_patterns"])))
    assert [row.modules for row in result.rows] == [2, 6]


def test_a_dry_run_needs_neither_weights_nor_data(run_file: RunFile, base: Path) -> None:
    path = run_file(MOLA)
    (path.parent / "rows.jsonl").unlink()
    config = molora.load_config(path)
    bare = path.parent / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    unweighed = config.model.model_copy(update={"name": str(bare)})
    result = dry_run(config.model_copy(update={"model": unweighed}))
    assert result.parameters == dry_run(config).parameters
    assert not (path.parent / "out").exists()


def test_fused_experts_of_the_base_are_named(run_file: RunFile, tmp_path: Path) -> None:
    base = save_base(tmp_path / "mixtral", "mixtral")
    path = run_file({**MOLA, "targets": "attention"}, model={"name": str(base)})
    result = dry_run(molora.load_config(path))
    assert any("experts" in name for name in result.untouched)
    assert "The base's own experts get no LoRA experts" in rendered(result)


def test_the_table_shows_every_figure(run_file: RunFile) -> None:
    result = dry_run(molora.load_config(run_file(MOLA)))
    shown = rendered(result)
    for text in ("all", "14", "2, 4", "3, 5", f"{result.trainable:,}", "router", "% of the base"):
        assert text in shown
    assert "get no LoRA experts" not in shown


def rendered(result: Any) -> str:
    console = Console(width=120, record=True, quiet=False)
    render(result, console)
    return console.export_text()


def test_a_missing_model_is_a_config_error(run_file: RunFile) -> None:
    config = molora.load_config(run_file(MOLA, model={"name": "no-such-model"}))
    with pytest.raises(molora.ConfigError, match=r"model.name='no-such-model' cannot be loaded"):
        dry_run(config)


def test_targets_that_do_not_fit_the_model_are_found(run_file: RunFile) -> None:
    config = molora.load_config(run_file({**MOLA, "targets": "q_porj"}))
    with pytest.raises(molora.AttachError, match="Close names: q_proj"):
        dry_run(config)


# ---------------------------------------------------------------------- configs/


def test_there_is_a_configuration_for_every_preset() -> None:
    assert set(PRESETS) <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_can_run(
    path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = molora.load_config(path)
    for source in (*config.data.train, *config.data.eval):
        assert source.path.is_file(), source.path
    assert not Path(config.model.name).is_absolute()
    assert config.output_dir.parts[0] == "runs"
    result = dry_run(
        config.model_copy(
            update={"model": config.model.model_copy(update={"name": str(base)})},
        )
    )
    assert result.trainable > 0
    assert result.method == config.mixture.method


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_presets_configuration_is_of_that_preset(name: str) -> None:
    config = molora.load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.mixture.method == name
    assert config.output_dir == Path("runs") / name
    typed = [source.task_types for source in config.data.train]
    assert (None not in typed) == (name == "loramoe")


def test_dry_runs_use_no_memory_for_weights(base: Path) -> None:
    from molora.config.run import ModelConfig
    from molora.train.loading import load_skeleton

    model = load_skeleton(ModelConfig(name=str(base)))
    assert {p.device for p in model.parameters()} == {torch.device("meta")}


def test_a_dry_run_does_not_pay_for_trl() -> None:
    sources = [source for source in read_sources(ROOT) if source.package == "train"]
    names = {source.path: source.module for source in sources}
    heavy = {line.partition(":")[0] for line in heavy_imports_at_start(sources)}
    trainers = {"molora.train.trainer", "molora.train.dpo"}
    assert {names[path] for path in heavy} == trainers
    eager = {
        source.module
        for source in sources
        for found in imports_of(source)
        if found.at_import and found.module in trainers
    }
    assert eager == set()

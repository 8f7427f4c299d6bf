"""Training what learns in a composed mixture: routers and new experts, from a saved one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from peft_experts import save_experts
from torch import Tensor
from transformers import AutoModelForCausalLM

import molora
from molora.compose.edit import saved_experts
from molora.config.run import RunConfig
from molora.config.saved import FROM, MANIFEST
from molora.errors import CheckpointError, ConfigError
from molora.io import native, read_manifest, read_tensors
from molora.train import TrainResult, train
from molora.train.dry_run import dry_run
from molora.train.run import as_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "compose").glob("*.yaml"))
STEPS = {"max_steps": 20, "batch_size": 8, "learning_rate": 0.02, "logging_steps": 1}


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_experts(tmp_path_factory.mktemp("experts"), base)


@pytest.fixture
def composed(base: Path, experts: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """(router, …) → a saved composition."""

    def compose(router: Any = "linear", **options: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base)
        molora.compose(model, molora.load_experts(experts), router=router, **options).save(
            tmp_path / "composed"
        )
        return tmp_path / "composed"

    return compose


@pytest.fixture
def run(run_file: Callable[..., Path]) -> Callable[..., RunConfig]:
    """(directory, mixture={…}, train={…}) → the run that goes on from there."""

    def load(directory: Path, *, mixture: Any = (), **sections: Any) -> RunConfig:
        sections["train"] = {**STEPS, **sections.get("train", {})}
        return molora.load_config(run_file({FROM: str(directory), **dict(mixture)}, **sections))

    return load


def tensors(directory: Path) -> dict[str, Tensor]:
    return read_tensors(directory, read_manifest(directory))


def losses(result: TrainResult) -> list[float]:
    return [line["loss"] for line in tiny_runs.lines(result.output_dir / "metrics.jsonl", "train")]


def is_router(name: str) -> bool:
    return "router." in name


@pytest.mark.parametrize(
    "router",
    ["linear", "lora_flow", {"kind": "xlora", "depth": 2, "width": 16, "dropout": 0.0}],
    ids=["linear", "lora_flow", "xlora"],
)
def test_routers_learn_and_experts_stay_bit_for_bit(
    composed: Callable[..., Path], run: Callable[..., RunConfig], router: Any
) -> None:
    directory = composed(router)
    result = train(run(directory), progress=False)
    found = losses(result)
    assert found[-1] < found[0] - 0.1
    before, after = tensors(directory), tensors(result.output_dir / "adapter")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    # where one expert alone adapts a linear, its router has nothing to choose
    free = {name for name in before if is_router(name) and ("q_proj" in name or "proj" not in name)}
    assert changed == free
    assert result.mixture.num_parameters()["experts"] == 0
    manifests = [read_manifest(d) for d in (directory, result.output_dir / "adapter")]
    assert manifests[0].mixture == manifests[1].mixture
    assert manifests[0].base == manifests[1].base


def test_new_experts_learn_beside_frozen_ones(
    composed: Callable[..., Path], run: Callable[..., RunConfig]
) -> None:
    directory = composed(new={"own": {"rank": 2}}, trainable=["law"])
    result = train(run(directory), progress=False)
    before, after = saved_experts(directory), saved_experts(result.output_dir / "adapter")
    for name in before.names:
        same = [
            torch.equal(getattr(one, part), getattr(other, part))
            for one, other in zip(
                before.adapters[name].modules.values(),
                after.adapters[name].modules.values(),
                strict=True,
            )
            for part in ("lora_A", "lora_B")
        ]
        assert all(same) if name in ("math", "code") else not any(same), name
    assert losses(result)[-1] < losses(result)[0] - 0.1


def test_a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted(
    composed: Callable[..., Path], run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    options = {"save_steps": 10, "batch_size": 3}
    directory = composed({"kind": "linear", "top_k": 2}, new={"own": {"rank": 2}}, dropout=0.1)
    straight = train(run(directory, train=options), progress=False)
    config = run(directory, train=options, output_dir=str(tmp_path / "again"))
    again = train(config, progress=False, resume=straight.output_dir / "checkpoint-10")
    found, expected = (tensors(r.output_dir / "adapter") for r in (again, straight))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # the control: the second half, from where the first ended but with another order of rows
    other = run(directory, train=options, output_dir=str(tmp_path / "other"), seed=5)
    train(other, progress=False)
    assert any(
        not torch.equal(tensor, expected[name])
        for name, tensor in tensors(tmp_path / "other" / "adapter").items()
    )


def test_the_written_configuration_names_the_directory_and_reads_back(
    composed: Callable[..., Path], run: Callable[..., RunConfig]
) -> None:
    directory = composed()
    loss = [{"term": {"kind": "load_balance"}}]
    config = run(directory, mixture={"losses": loss, "backend": "dense"})
    assert config.train.start_from == directory
    assert config.mixture.backend == "dense"
    assert len(config.mixture.losses) == 1
    assert config.mixture.groups == read_manifest(directory).mixture.groups
    text = as_yaml(config)
    assert "model.layers" not in text
    assert str(directory) in text
    # where it is another mixture by now, or none, every linear is spelt out
    composed(missing="zero")
    assert "model.layers.0.self_attn.q_proj" in as_yaml(config)
    (directory / MANIFEST).unlink()
    assert "model.layers.0.self_attn.q_proj" in as_yaml(config)


def test_dry_run_shows_linears_by_their_last_names(
    composed: Callable[..., Path], run: Callable[..., RunConfig]
) -> None:
    found = dry_run(run(composed()))
    assert {row.pattern: (row.modules, row.experts) for row in found.rows} == {
        "q_proj": (2, (3,)),
        "v_proj": (2, (3,)),
        "down_proj": (2, (3,)),
    }
    assert found.parameters == {"experts": 0, "router": 3 * (2 * 32 + 2 * 32 + 2 * 40)}
    assert found.sites == 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_can_run(
    path: Path,
    base: Path,
    composed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "runs").mkdir()
    composed(new=["python"]).rename(tmp_path / "runs" / "composed")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    config = molora.load_config(path)
    assert config.train.start_from == Path("runs/composed")
    for source in (*config.data.train, *config.data.eval):
        assert source.path is not None
        assert source.path.is_file(), source.path
    model = config.model.model_copy(update={"name": str(base)})
    assert dry_run(config.model_copy(update={"model": model})).parameters["router"] > 0


@pytest.mark.parametrize(
    ("mixture", "train_section", "message"),
    [
        ({}, {"start_from": "elsewhere"}, "two places to start from"),
        ({"dtype": "bfloat16"}, {}, "unknown key 'dtype'"),
        ({"losses": [{"term": {"kind": "load_balanc"}}]}, {}, "load_balanc"),
    ],
)
def test_a_run_that_cannot_be_says_why(
    composed: Callable[..., Path],
    run: Callable[..., RunConfig],
    mixture: Any,
    train_section: Any,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(composed(), mixture=mixture, train=train_section)


def test_a_place_without_a_mixture_is_named(run: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.molora\.json cannot be read"):
        run(tmp_path / "nowhere")
    for text in ("{", "[]", "{}", "[" * 100_000, '{"mixture": {"groups": 3}}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ConfigError, match=r"mixture\.from|groups"):
            run(tmp_path)
    assert MANIFEST == native.MANIFEST


def test_a_changed_configuration_is_found_before_anything_is_trained(
    composed: Callable[..., Path], run: Callable[..., RunConfig]
) -> None:
    directory = composed()
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    data["mixture"]["groups"][0]["router"]["temperature"] = 2.0
    path.write_text(json.dumps(data))
    config = run(directory)
    with pytest.raises(CheckpointError, match="changed"):
        train(config, progress=False)
    assert not (config.output_dir / "adapter").exists()


def test_experts_that_lack_a_linear_are_not_called_dead(
    composed: Callable[..., Path], run: Callable[..., RunConfig]
) -> None:
    options = {"dead_steps": 2, "max_steps": 6, "logging_steps": 2}
    result = train(run(composed({"kind": "linear", "top_k": 2}), train=options), progress=False)
    metrics = result.output_dir / "metrics.jsonl"
    sites = tiny_runs.lines(metrics, "routing")[-1]["sites"]
    # only "code", the second of three, adapts it: all choices are its, and that is even
    down = sites["model.layers.0.mlp.down_proj"]
    assert down["load"] == [0, 1, 0]
    assert (down["load_min"], down["load_max"], down["dead"]) == (1, 1, [])
    assert down["balance"] == pytest.approx(1)
    alarms = tiny_runs.lines(metrics, "alarm")
    assert not [line for line in alarms if "q_proj" not in line["site"]]
    assert all(line["dead_experts"] <= 2 for line in tiny_runs.lines(metrics, "train"))

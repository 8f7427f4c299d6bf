"""A run from YAML to an adapter that loads: what it writes, repeats and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_runs import ROWS, lines, save_base, write_rows
from transformers import AutoModelForCausalLM

import molora
from molora.train.__main__ import main
from molora.train.progress import ProgressDisplay
from molora.train.run import TrainResult, train
from molora.train.trainer import SFTTrainer

RunFile = Callable[..., Path]
MOLA = {"preset": "mola", "num_experts": 4, "rank": 3}
TYPED = [{**row, "task_types": number % 2} for number, row in enumerate(ROWS)]


def run(path: Path) -> TrainResult:
    return train(molora.load_config(path), progress=False)


def base_model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def example(tokenizer: Any) -> dict[str, torch.Tensor]:
    return tokenizer([ROWS[3]["prompt"] + ROWS[3]["completion"]], return_tensors="pt")


def test_a_run_leaves_an_adapter_that_loads_and_equals_the_trained_model(
    run_file: RunFile, base: Path
) -> None:
    result = run(run_file(MOLA, train={"max_steps": 20}))
    assert sorted(p.name for p in result.output_dir.iterdir()) == [
        "adapter",
        "config.yaml",
        "metrics.jsonl",
    ]
    assert len(list((result.output_dir / "adapter").iterdir())) == 2
    batch = example(result.tokenizer)
    trained = result.model(**batch).logits
    plain = base_model(base)
    before = plain(**batch).logits
    molora.load(plain, result.output_dir / "adapter")
    assert torch.equal(plain(**batch).logits, trained)
    assert (trained - before).abs().max() > 1e-2


def test_the_model_is_left_as_it_was_but_for_the_mixture(run_file: RunFile, base: Path) -> None:
    result = run(run_file(MOLA, train={"gradient_checkpointing": True}))
    model: Any = result.model
    assert not model.training
    assert "forward" not in vars(model)
    assert model.config.use_cache
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    batch = example(result.tokenizer)
    assert model(**batch).past_key_values is not None
    result.mixture.detach()
    assert torch.equal(model(**batch).logits, base_model(base)(**batch).logits)


def test_metrics_are_lines_of_json(run_file: RunFile, tmp_path: Path) -> None:
    rows = [{**row, "task": "ab"[number % 2]} for number, row in enumerate(ROWS)]
    held_out = write_rows(tmp_path / "eval.jsonl", rows[:3])
    result = run(
        run_file(
            MOLA,
            rows=rows,
            data={"eval": [str(held_out)]},
            train={"max_steps": 6, "logging_steps": 2, "eval_steps": 4},
        )
    )
    file = result.output_dir / "metrics.jsonl"
    trained, evaluated = lines(file, "train"), lines(file, "eval")
    assert [line["step"] for line in trained] == [2, 4, 6]
    assert [line["step"] for line in evaluated] == [4, 6]
    expected = {"loss", "aux_loss", "aux/load_balance", "load_min", "load_max", "dead_experts"}
    expected |= {"grad_norm", "learning_rate", "tokens", "tokens_per_second", "memory_mib"}
    assert expected <= trained[0].keys()
    assert "num_tokens" not in trained[0]
    assert all(line["memory_mib"] > 100 and line["seconds"] > 0 for line in trained)
    (summary,) = lines(file, "summary")
    assert summary["step"] == 6
    assert summary["tokens"] == result.tokens == trained[-1]["tokens"] > 0
    assert summary["eval_loss"] == evaluated[-1]["eval_loss"] == result.metrics["eval_loss"]
    assert summary["train_loss"] == result.metrics["train_loss"]
    assert summary["parameters"] == result.mixture.num_parameters()
    assert summary["data"]["train"]["rows"] == 8
    assert summary["data"]["tasks"] == ["a", "b"]
    assert summary["versions"]["molora"] == molora.__version__
    assert {"torch", "trl", "python"} <= summary["versions"].keys()


def test_the_resolved_configuration_is_written_and_reads_back(run_file: RunFile) -> None:
    # words that other readers of YAML take for a number, a boolean and nothing
    rows = [{**row, "task": "no"} for row in ROWS]
    path = run_file({**MOLA, "targets": ["re:.*_proj"]}, rows=rows, train={"learning_rate": 1e-5})
    config = molora.load_config(path)
    source = config.data.train[0].model_copy(update={"task": "1e4"})
    data = config.data.model_copy(update={"train": (source,)})
    config = config.model_copy(update={"data": data})
    result = train(config, progress=False)
    assert molora.load_config(result.output_dir / "config.yaml") == config
    assert "preset" not in (result.output_dir / "config.yaml").read_text()


def test_a_run_repeats_bit_for_bit(run_file: RunFile, tmp_path: Path) -> None:
    def outcome(name: str, seed: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        path = run_file(MOLA, seed=seed, output_dir=str(tmp_path / name), train={"max_steps": 8})
        result = run(path)
        losses = [line["loss"] for line in lines(result.output_dir / "metrics.jsonl", "train")]
        return {k: t.clone() for k, t in result.mixture.state_dict().items()}, losses

    state, losses = outcome("first", 3)
    again, losses_again = outcome("again", 3)
    assert losses_again == losses
    torch.testing.assert_close(again, state, rtol=0, atol=0)
    other, losses_of_other = outcome("other", 4)
    assert losses_of_other != losses
    assert all((other[name] - state[name]).abs().max() > 1e-4 for name in state)


def test_mixtures_are_saved_on_the_way(run_file: RunFile, base: Path) -> None:
    result = run(run_file(MOLA, train={"max_steps": 5, "save_steps": 2}))
    names = sorted(path.name for path in result.output_dir.glob("checkpoint-*"))
    assert names[:2] == ["checkpoint-2", "checkpoint-4"]
    halfway = molora.load(base_model(base), result.output_dir / "checkpoint-2").state_dict()
    final = molora.load(base_model(base), result.output_dir / "adapter").state_dict()
    torch.testing.assert_close(final, result.mixture.state_dict(), rtol=0, atol=0)
    assert all(not torch.equal(halfway[n], final[n]) for n in final if n.endswith("lora_B"))


def test_settings_reach_the_trainer(run_file: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    original = SFTTrainer.train

    def spy(trainer: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        output = original(trainer, *args, **kwargs)
        groups = trainer.optimizer.param_groups
        seen.update(
            steps=trainer.state.global_step,
            rates=[group["initial_lr"] for group in groups],
            decay=[group["weight_decay"] for group in groups],
            rising=[line["learning_rate"] for line in trainer.state.log_history[:-1]],
            threads=torch.get_num_threads(),
            seed=trainer.args.seed,
        )
        return output

    monkeypatch.setattr(SFTTrainer, "train", spy)
    before = torch.get_num_threads()
    options = {"max_steps": None, "epochs": 2.0, "batch_size": 2, "gradient_accumulation": 2}
    options |= {"router_learning_rate": 1e-4, "weight_decay": 0.01, "schedule": "constant"}
    options |= {"warmup_ratio": 1.0, "logging_steps": 1, "threads": 2}
    run(run_file(MOLA, train=options, seed=7))
    assert seen["seed"] == 7
    assert seen["steps"] == 4
    assert seen["rates"] == [5e-3, 5e-3, 1e-4]
    assert seen["decay"] == [0.01, 0.01, 0.0]
    assert seen["rising"] == pytest.approx([0.0, 1.25e-3, 2.5e-3, 3.75e-3])
    assert seen["threads"] == 2
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------------- the terminal


def test_progress_is_a_line_per_logging_step_where_there_is_no_terminal(run_file: RunFile) -> None:
    shown = shown_by(run_file, Console(record=True, force_terminal=False, quiet=False, width=200))
    (first, second) = [line for line in shown.splitlines() if line.startswith("step")]
    assert first.startswith("step 2/4 · ")
    assert second.startswith("step 4/4 · 0 s left · loss ")
    for word in ("aux 0.00", "load 0.", "tokens/s", "MiB"):
        assert word in second
    assert "8 examples of 8 rows: 59 tokens, 23 of them with a loss" in shown
    assert "% of the base" in shown


def test_progress_is_a_bar_on_a_terminal(run_file: RunFile) -> None:
    shown = shown_by(run_file, Console(record=True, force_terminal=True, width=200))
    assert "4/4" in shown
    assert "tokens/s" in shown


def shown_by(run_file: RunFile, console: Console) -> str:
    import molora.train.run as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ProgressDisplay", lambda quiet: ProgressDisplay(console))
        train(molora.load_config(run_file(MOLA)))
    return console.export_text()


@pytest.mark.parametrize("rank", [["--local_rank=1"], ["--local-rank", "1"]])
def test_launchers_may_put_the_rank_anywhere(
    rank: list[str], run_file: RunFile, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(MOLA)
    assert main([*rank, str(path), "--quiet"]) == 0
    assert (path.parent / "out" / "adapter" / "molora.json").is_file()
    assert "loss" not in capsys.readouterr().err


def test_a_users_fault_is_one_message_and_exit_code_2(
    run_file: RunFile, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_file({**MOLA, "top_k": 9}))]) == 2
    error = capsys.readouterr().err
    assert "top_k=9 exceeds num_experts=4" in error
    assert "Traceback" not in error


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize("name", ["no-such-model", "molora-tests/absent"])
def test_a_model_that_cannot_be_found_is_a_config_error(name: str, run_file: RunFile) -> None:
    path = run_file(MOLA)
    config = molora.load_config(path)
    missing = config.model.model_copy(update={"name": name})
    with pytest.raises(molora.ConfigError, match=f"model.name='{name}' cannot be loaded: .* Give"):
        train(config.model_copy(update={"model": missing}), progress=False)
    assert not (path.parent / "out").exists()
    nowhere = config.model.model_copy(update={"name": str(path.parent / "nowhere")})
    with pytest.raises(molora.ConfigError, match="cannot be loaded: there is no such directory"):
        train(config.model_copy(update={"model": nowhere}), progress=False)


def test_damaged_weights_are_a_config_error(run_file: RunFile, tmp_path: Path) -> None:
    broken = save_base(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = molora.load_config(run_file(MOLA, model={"name": str(broken)}))
    with pytest.raises(molora.ConfigError, match="cannot be loaded"):
        train(config, progress=False)


def test_loramoe_needs_task_types_and_says_where(run_file: RunFile) -> None:
    preset = {"preset": "loramoe"}
    path = run_file(preset)
    with pytest.raises(molora.DataError, match=r"data.train has no column `task_types`.*losses"):
        run(path)
    assert not (path.parent / "out").exists()
    wrong = [{**row, "task_types": 2} for row in ROWS]
    with pytest.raises(molora.DataError, match=r"has the values \[2\].*use 0 and 1"):
        run(run_file(preset, rows=wrong))
    assert run(run_file(preset, rows=TYPED)).tokens > 0
    assert run(run_file({**preset, "losses": []})).tokens > 0


def test_a_run_that_fails_leaves_the_adapter_of_the_run_before(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_file(MOLA, train={"max_steps": 3})
    adapter = run(path).output_dir / "adapter"
    kept = {file.name: file.read_bytes() for file in adapter.iterdir()}
    original = SFTTrainer.compute_loss

    def failing(trainer: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == kept
    assert lines(adapter.parent / "metrics.jsonl", "summary") == []
    other = run_file(MOLA, output_dir=str(path.parent / "other"))
    with pytest.raises(KeyboardInterrupt):
        run(other)
    assert not (path.parent / "other" / "adapter").exists()


def test_an_adapter_path_that_is_a_file_is_refused_before_training(run_file: RunFile) -> None:
    path = run_file(MOLA)
    adapter = path.parent / "out" / "adapter"
    adapter.parent.mkdir(parents=True)
    adapter.write_text("mine")
    with pytest.raises(molora.CheckpointError, match="is not a directory"):
        run(path)
    assert adapter.read_text() == "mine"
    assert not (path.parent / "out" / "metrics.jsonl").exists()


def test_tokens_count_the_steps_after_the_last_line_of_metrics_too(run_file: RunFile) -> None:
    steps = {"max_steps": 3, "batch_size": 8}
    every = run(run_file(MOLA, train={**steps, "logging_steps": 1}))
    last_line = run(run_file(MOLA, train={**steps, "logging_steps": 2}))
    logged = lines(last_line.output_dir / "metrics.jsonl", "train")
    assert last_line.tokens == every.tokens > logged[-1]["tokens"] > 0


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    from molora.train.metrics import MetricsWriter

    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write("train", 1, {"loss": float("nan"), "parts": {"aux": float("inf")}, "load": 1.5})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["loss"], line["parts"]["aux"], line["load"]) == (None, None, 1.5)


def test_a_run_that_is_refused_leaves_the_files_of_the_run_before(run_file: RunFile) -> None:
    first = run_file(MOLA, train={"save_steps": 2})
    train(molora.load_config(first), progress=False)
    out = molora.load_config(first).output_dir
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    other = run_file(MOLA, train={"learning_rate": 1e-4, "save_steps": 2})
    with pytest.raises(molora.CheckpointError, match="is of an earlier run"):
        train(molora.load_config(other), progress=False)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert {"config.yaml", "metrics.jsonl"} <= before.keys()

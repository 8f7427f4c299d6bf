"""A run that is interrupted and goes on equals one that was not, in one process; B-22, B-23."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from resumable import ROWS, STEPS, At, Killed, everything, kill, logged, trainer_in
from tiny_models import batch_for, tiny
from torch import Tensor
from transformers import TrainerCallback

import molora
from molora.io import read_checkpoint
from molora.train import SFTTrainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> SFTTrainer:
    """A run that nothing interrupts."""
    trainer = trainer_in(tmp_path_factory.mktemp("straight") / "out")
    trainer.train()
    return trainer


def interrupted(out: Path, at: int, **options: Any) -> None:
    with pytest.raises(Killed):
        trainer_in(out, callbacks=[At(at, kill)], **options).train()


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize(("save", "at"), [(4, 6), (5, 7), (7, 11)], ids=["mid", "epoch", "late"])
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted(
    save: int, at: int, checkpointing: bool, tmp_path: Path, straight: SFTTrainer
) -> None:
    """In the middle and at the end of an epoch, with dropout, inside a window of metrics."""
    out = tmp_path / "out"
    options = {"save_steps": save, "activation_checkpointing": checkpointing}
    interrupted(out, at, **options)
    # another seed: nothing of the new process's own start may be left
    resumed = trainer_in(out, seed=5, **options)
    torch.manual_seed(1234)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    torch.testing.assert_close(everything(resumed), everything(straight), rtol=0, atol=0)
    assert logged(resumed) == logged(straight)


def test_another_data_order_or_dropout_would_be_seen(tmp_path: Path, straight: SFTTrainer) -> None:
    other = trainer_in(tmp_path / "out", callbacks=[At(5, lambda: torch.rand(1))])
    other.train()
    found, expected = everything(other), everything(straight)
    worst = max((found[name] - expected[name]).abs().max() for name in expected)
    assert worst > 1e-3
    assert logged(other) != logged(straight)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    first = trainer_in(tmp_path / "out", save_steps=6)
    first.train()
    again = trainer_in(tmp_path / "out", save_steps=6)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(everything(again), everything(first), rtol=0, atol=0)


def test_float32_copies_are_not_stale_after_loading(tmp_path: Path) -> None:
    """B-23: a step with a learning rate of 0 leaves the loaded weights as they are."""
    out = tmp_path / "out"
    interrupted(out, 5, lr_scheduler_type="constant")
    saved = molora.load(tiny("llama"), out / "checkpoint-4").state_dict()
    resumed = trainer_in(out, seed=5, lr_scheduler_type="constant", max_steps=5)

    class NoRate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for group in resumed.optimizer.param_groups:
                group["lr"] = 0.0

    resumed.add_callback(NoRate())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    torch.testing.assert_close(resumed.mixture.state_dict(), saved, rtol=0, atol=0)


def test_a_longer_run_continues_with_its_own_schedule(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, 8)
    resumed = trainer_in(out, max_steps=STEPS + 4, logging_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS + 4
    # lines by the new interval, not by the one that the checkpoint had
    assert [line["step"] for line in logged(resumed)][-5:-1] == [13, 14, 15, 16]


# ---------------------------------------------------------------------- which checkpoint


def test_auto_takes_the_newest_complete_one_and_says_which(
    tmp_path: Path, straight: SFTTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    interrupted(out, 10)
    whole = next((out / "checkpoint-8").glob("trainer-*.safetensors"))
    whole.write_bytes(whole.read_bytes()[:-1])
    resumed = trainer_in(out)
    resumed.train(resume_from_checkpoint="auto")
    said = capsys.readouterr().err
    assert "passed over checkpoint-8" in said
    assert "truncated" in said
    assert "resuming from" in said
    assert "checkpoint-4, step 4" in said
    torch.testing.assert_close(everything(resumed), everything(straight), rtol=0, atol=0)


def test_auto_starts_from_the_beginning_where_there_is_none(
    tmp_path: Path, straight: SFTTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_in(tmp_path / "out")
    trainer.train(resume_from_checkpoint="auto")
    assert "starting from the beginning" in capsys.readouterr().err
    torch.testing.assert_close(everything(trainer), everything(straight), rtol=0, atol=0)


def test_true_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(molora.CheckpointError, match="no complete checkpoint to resume from"):
        trainer_in(tmp_path / "out").train(resume_from_checkpoint=True)


def test_an_older_run_in_the_same_directory_is_not_mixed_up_with_a_new_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, 10)
    with pytest.raises(molora.CheckpointError, match=r"checkpoint-8 is of an earlier run"):
        trainer_in(out).train()
    with pytest.raises(molora.CheckpointError, match=r"checkpoint-8 is of an earlier run"):
        trainer_in(out).train(resume_from_checkpoint=str(out / "checkpoint-4"))
    # elsewhere it may go on from any of them
    resumed = trainer_in(tmp_path / "new")
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert resumed.state.global_step == STEPS


def test_a_checkpoint_that_was_moved_resumes(tmp_path: Path, straight: SFTTrainer) -> None:
    interrupted(tmp_path / "out", 6)
    shutil.move(tmp_path / "out" / "checkpoint-4", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "out")
    resumed = trainer_in(tmp_path / "new")
    resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    torch.testing.assert_close(everything(resumed), everything(straight), rtol=0, atol=0)


def test_a_damaged_checkpoint_that_is_named_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, 6)
    file = next((out / "checkpoint-4").glob("molora-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    trainer = trainer_in(out)
    before = {name: value.clone() for name, value in trainer.mixture.state_dict().items()}
    with pytest.raises(molora.CheckpointError, match="does not have the SHA-256"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    torch.testing.assert_close(trainer.mixture.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01 and is 0.02"),
        ({"gradient_accumulation_steps": 1}, r"batch size \(.*\) was 8 and is 4"),
        ({"rows": ROWS[:-1]}, "training rows was '40 rows"),
        ({"mixture": {"rank": 4}}, "mixture was"),
        ({"keywords": {"router_learning_rate": 1e-3}}, "learning rate was 0.03 and is 0.001"),
        ({"weight_decay": 0.1}, "weight_decay was 0.0 and is 0.1"),
    ],
    ids=["rate", "batch", "rows", "mixture", "router rate", "decay"],
)
def test_a_checkpoint_of_another_run_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(out, 5)
    with pytest.raises(molora.CheckpointError, match=message):
        trainer_in(out, **options).train(resume_from_checkpoint=True)


def test_other_roles_than_were_trained_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, 5)
    trainer = trainer_in(out)
    trainer.mixture.freeze("router")
    with pytest.raises(molora.CheckpointError, match=r"other parameters.*router\.weight"):
        trainer.train(resume_from_checkpoint=True)


# ---------------------------------------------------------------------- what is in one


def test_a_checkpoint_holds_what_is_trained_and_no_more(tmp_path: Path) -> None:
    """B-21, and no file that runs code when it is read."""
    out = tmp_path / "out"
    mixture = {"rank": 40}
    interrupted(out, 5, mixture=mixture)
    directory = out / "checkpoint-4"
    weights = molora.load(tiny("llama"), directory).state_dict()
    needed = 3 * sum(value.numel() * value.itemsize for value in weights.values())
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert needed < size < 1.2 * needed
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}


def test_old_checkpoints_are_deleted_but_for_the_best(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = Dataset.from_dict({"input_ids": ROWS[:8], "labels": ROWS[:8]})
    trainer = trainer_in(
        out,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
        # far too much: the loss gets worse from some step on
        learning_rate=0.5,
        lr_scheduler_type="constant",
        keywords={"eval_dataset": rows, "router_learning_rate": None},
    )
    trainer.train()
    losses = {
        line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line
    }
    best = min(losses, key=lambda step: losses[step])
    assert best < STEPS
    assert trainer.state.best_global_step == best
    assert sorted(path.name for path in out.iterdir()) == sorted(
        {f"checkpoint-{best}", f"checkpoint-{STEPS}"}
    )
    # the model has the best weights at the end, and they are what is saved
    saved = molora.load(tiny("llama"), out / f"checkpoint-{best}").state_dict()
    torch.testing.assert_close(trainer.mixture.state_dict(), saved, rtol=0, atol=0)
    last = molora.load(tiny("llama"), out / f"checkpoint-{STEPS}").state_dict()
    assert max((saved[name] - last[name]).abs().max() for name in saved) > 1e-3


# ---------------------------------------------------------------------- faults and signals


def spoil(trainer: SFTTrainer, name: str) -> Callable[[], None]:
    def act() -> None:
        with torch.no_grad():
            dict(trainer.model.named_parameters())[name].view(-1)[3] = math.inf

    return act


def test_a_weight_that_is_not_finite_stops_the_run_with_its_name(tmp_path: Path) -> None:
    """B-34."""
    out = tmp_path / "out"
    trainer = trainer_in(out)
    name = "model.layers.1.mlp.down_proj.experts.lora_A"
    trainer.add_callback(At(5, spoil(trainer, name)))
    before: dict[str, Tensor] = {}
    trainer.add_callback(
        At(
            5,
            lambda: before.update({k: v.clone() for k, v in trainer.mixture.state_dict().items()}),
        )
    )
    with pytest.raises(molora.TrainingError, match=r"step 6: the loss is nan") as caught:
        trainer.train()
    assert f"first at the weights {name}" in str(caught.value)
    assert "checkpoint-4 is the last complete checkpoint" in str(caught.value)
    assert trainer.state.global_step == 5
    after = trainer.mixture.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert read_checkpoint(out / "checkpoint-4").step == 4


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "out", save_strategy="no")
    name = "model.layers.0.self_attn.q_proj.router.weight"
    parameter = dict(trainer.model.named_parameters())[name]

    def poison() -> None:
        parameter.register_hook(lambda gradient: gradient * math.nan)

    # before the trainer's own hooks, so that these see what the optimiser would
    poison()
    with pytest.raises(
        molora.TrainingError, match=rf"step 1: the gradient of {name} is not finite.*none was saved"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_base_that_overflows_is_named_by_its_module(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "out", save_strategy="no")
    layer = trainer.model.model.layers[1]
    layer.mlp.act_fn.register_forward_hook(lambda *_: torch.tensor(math.inf))
    with pytest.raises(
        molora.TrainingError, match=r"first at the output of model\.layers\.1\.mlp\.down_proj"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_leaves_a_checkpoint_that_resumes(
    number: int,
    error: type[BaseException],
    tmp_path: Path,
    straight: SFTTrainer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer = trainer_in(out, save_strategy="no")
    trainer.add_callback(At(6, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(error) as caught:
        trainer.train()
    if error is SystemExit:
        assert caught.value.code == 143
    # noted after step 6, acted on after the next one
    assert [path.name for path in out.iterdir()] == ["checkpoint-7"]
    assert "stopped after step 7" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = trainer_in(out, save_strategy="no")
    resumed.train(resume_from_checkpoint="auto")
    torch.testing.assert_close(everything(resumed), everything(straight), rtol=0, atol=0)


@pytest.fixture
def _as_in_a_terminal() -> Iterator[None]:
    """Programs that are started in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_as_in_a_terminal")
def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "out", save_strategy="no")

    def twice() -> None:
        # not both at once: of two signals that wait, one is delivered
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    trainer.add_callback(At(2, twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_mixture_of_a_checkpoint_loads_and_computes_the_same(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "out", save_steps=STEPS)
    trainer.train()
    loaded = molora.load(tiny("llama"), tmp_path / "out" / f"checkpoint-{STEPS}")
    batch = batch_for(loaded.model)
    expected = trainer.model.eval()(**batch).logits
    assert torch.equal(loaded.model.eval()(**batch).logits, expected)
    with loaded.disabled():
        assert (loaded.model(**batch).logits - expected).abs().max() > 1e-2


def test_run_states_are_json_without_surprises(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 5)
    text = (tmp_path / "out" / "checkpoint-4" / "run_state.json").read_text()
    state = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert state["logged_step"] == 3

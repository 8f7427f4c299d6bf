"""Preference training: what it does, what is left of it, what is refused, and runs from a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from chat_models import save_chat_model
from datasets import Dataset
from preference_trainers import CAPACITY, FFN, logged, mixture_on, pairs, trainer_on
from safetensors import safe_open
from tiny_models import tiny
from tiny_runs import WORDS, lines, tokenizer
from torch import nn

import molora
from molora.config.run import RunConfig
from molora.train import DPOTrainer, train

ROOT = Path(__file__).parents[2]
MOLA = {"preset": "mola", "num_experts": 4, "top_k": 2, "rank": 3, "dropout": 0.0}
ROWS = [
    {
        "prompt": " ".join(WORDS[(7 * i + j) % 60] for j in range(2 + i % 4)),
        "chosen": f" {WORDS[(3 * i) % 20]}",
        "rejected": " " + " ".join(WORDS[20 + (5 * i + j) % 40] for j in range(1 + i % 3)),
    }
    for i in range(8)
]


# ---------------------------------------------------------------------- training


def test_twenty_steps_raise_the_margin_and_leave_the_base(tmp_path: Path) -> None:
    mixture = mixture_on()
    for name, tensor in mixture.state_dict().items():
        if name.endswith("lora_B"):
            tensor.zero_()
    ours = {id(p) for _, p in mixture.named_parameters()}
    before = {n: p.detach().clone() for n, p in mixture.model.named_parameters()}
    trainer = trainer_on(mixture, tmp_path, max_steps=20, eval_dataset=pairs())
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert first["eval_rewards/margins"] == 0
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["eval_rewards/margins"] > 0.5
    assert last["eval_rewards/accuracies"] == 1
    assert last["eval_loss"] < 0.5
    margins = [line["rewards/margins"] for line in logged(trainer)]
    assert margins[-1] > margins[0] + 0.5
    for name, parameter in mixture.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in ours), name


@pytest.mark.parametrize("group", [FFN, CAPACITY], ids=["ffn", "capacity"])
def test_gradient_checkpointing_changes_nothing(group: dict[str, Any], tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        mixture = mixture_on(**group)
        start = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
        options = {"activation_checkpointing": checkpointing, "max_steps": 3, "aux_losses": True}
        trainer_on(mixture, tmp_path, **options).train()
        states.append({name: t.clone() for name, t in mixture.state_dict().items()})
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert all((states[0][name] - start[name]).abs().max() > 1e-3 for name in start)


def test_references_computed_beforehand_train_the_same(tmp_path: Path) -> None:
    states = []
    for beforehand in (False, True):
        mixture = mixture_on()
        trainer = trainer_on(
            mixture,
            tmp_path,
            max_steps=4,
            precompute_ref_log_probs=beforehand,
            eval_dataset=pairs(),
        )
        assert ("ref_chosen_logps" in trainer.train_dataset.column_names) is beforehand
        trainer.train()
        states.append((mixture.state_dict(), trainer.evaluate()["eval_loss"]))
    torch.testing.assert_close(states[1][0], states[0][0], rtol=1e-3, atol=1e-4)
    assert states[1][1] == pytest.approx(states[0][1], rel=1e-3)


def test_what_is_saved_is_the_mixture(tmp_path: Path) -> None:
    mixture = mixture_on()
    trainer = trainer_on(mixture, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-2"
    loaded = molora.load(tiny("llama"), folder)
    torch.testing.assert_close(loaded.state_dict(), mixture.state_dict(), rtol=0, atol=0)
    base = {n for n, _ in tiny("llama").named_parameters()}
    files = list(folder.glob("*.safetensors"))
    assert files
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert not base & set(file.keys())
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}


def test_a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """Saved inside an open window of metrics, rewards and margins among them."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "logging_steps": 3}
    straight = trainer_on(mixture_on(), tmp_path / "straight", **options)
    straight.train()
    resumed = trainer_on(mixture_on(), tmp_path / "resumed", **options)
    folder = tmp_path / "straight" / "out" / "checkpoint-4"
    resumed.train(resume_from_checkpoint=str(folder))
    ends = [trainer.mixture.state_dict() for trainer in (straight, resumed)]
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    timed = ("tokens_per_second", "memory_mib")
    first, again = (
        [{n: v for n, v in line.items() if n not in timed} for line in logged(trainer)]
        for trainer in (straight, resumed)
    )
    assert again == first
    assert "rewards/margins" in again[-1]
    other = trainer_on(mixture_on(), tmp_path / "other", **options, beta=0.3)
    with pytest.raises(molora.CheckpointError, match=r"beta was 0\.1 and is 0\.3"):
        other.train(resume_from_checkpoint=str(folder))


def test_trls_own_preparation_gives_the_same_loss(tmp_path: Path) -> None:
    """Rows as text, tokenised by TRL, whose template-less form is ours with an eos."""
    rows = [
        {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6", "task_ids": 0},
        {"prompt": "w7", "chosen": " w8", "rejected": " w9 w10 w11", "task_ids": 1},
    ]
    mixture = mixture_on()
    trainer = trainer_on(mixture, tmp_path, data=Dataset.from_list(rows))
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["task_ids"].tolist() == [0, 1, 0, 1]
    ids = tokenizer()("w4 w5")["input_ids"]
    assert trainer.train_dataset[0]["chosen_ids"] == [*ids, tokenizer().eos_token_id]
    trainer.train()
    assert logged(trainer)[0]["tokens"] == int(batch["attention_mask"].sum())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref_model": nn.Linear(2, 2)}, "needs no model of its own"),
        ({"sync_ref_model": True}, "sync_ref_model=True: the reference is the frozen base"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5: the reference's log-probabilities"),
        ({"padding_free": True}, "padding_free=True"),
        ({"use_liger_kernel": True}, "experts then do nothing"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(molora.ConfigError, match=message):
        trainer_on(mixture_on(), tmp_path, **options)


def test_references_beforehand_and_an_engine_are_refused(tmp_path: Path) -> None:
    mixture = mixture_on()
    arguments = trl.DPOConfig(str(tmp_path), precompute_ref_log_probs=True, bf16=False)
    arguments.deepspeed = "zero2.json"
    with pytest.raises(molora.ConfigError, match="into an engine of its own"):
        DPOTrainer(mixture.model, arguments, mixture=mixture, train_dataset=pairs())


def test_losses_that_do_not_exist_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(molora.ConfigError, match="the mixture has no auxiliary losses"):
        trainer_on(mixture_on(losses=()), tmp_path, aux_losses=True)


@pytest.mark.parametrize("extra", [{"train_modules": ["lm_head"]}, {"train_tokens": {"ids": [4]}}])
def test_a_base_that_is_trained_itself_is_no_reference(
    extra: dict[str, Any], tmp_path: Path
) -> None:
    mixture = molora.attach(tiny("llama"), molora.presets.mola(num_experts=4, rank=3, **extra))
    with pytest.raises(molora.ConfigError, match="the reference would change with them"):
        trainer_on(mixture, tmp_path)
    mixture.freeze("other")
    trainer_on(mixture, tmp_path).train()


def test_experts_on_the_head_and_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(molora.AttachError, match="lm_head has experts"):
        trainer_on(mixture_on(targets=("q_proj", "lm_head")), tmp_path)
    with pytest.raises(molora.AttachError, match="not the one that carries the mixture"):
        DPOTrainer(tiny("llama"), mixture=mixture_on(), train_dataset=pairs())


# ---------------------------------------------------------------------- from a file


def test_a_run_from_a_file_learns_the_preference(run_file: Callable[..., Path]) -> None:
    path = run_file(
        MOLA,
        rows=ROWS,
        data={"eval": [str(run_file(MOLA, rows=ROWS).parent / "rows.jsonl")]},
        train={
            "objective": {"kind": "dpo", "beta": 0.5, "loss": "ipo"},
            "max_steps": 12,
            "learning_rate": 1e-2,
            "save_steps": 12,
            "gradient_checkpointing": True,
        },
    )
    result = train(molora.load_config(path), progress=False)
    steps = lines(result.output_dir / "metrics.jsonl", "train")
    assert steps[0]["loss"] == pytest.approx(1.0, abs=0.3)  # 1 / (2 beta), squared, at B = 0
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"] + 0.5
    assert "aux_loss" not in steps[-1]
    assert result.metrics["eval_rewards/accuracies"] > 0.8
    (summary,) = lines(result.output_dir / "metrics.jsonl", "summary")
    assert summary["data"]["train"]["rows"] == summary["data"]["train"]["examples"] == 8
    assert result.tokens > 12 * 4 * 2 * 5
    loaded = molora.load(
        tiny("llama", vocab_size=64, pad_token_id=None, initializer_range=0.5),
        result.output_dir / "adapter",
    )
    torch.testing.assert_close(
        loaded.state_dict(), result.mixture.state_dict(), rtol=0, atol=0, check_device=False
    )
    written = molora.load_config(result.output_dir / "config.yaml")
    assert written.train.objective == molora.load_config(path).train.objective


def test_settings_of_a_file_reach_the_trainer(
    run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[DPOTrainer] = []
    init = DPOTrainer.__init__
    monkeypatch.setattr(
        DPOTrainer, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k)
    )
    objective = {"kind": "dpo", "beta": 0.7, "loss": "hinge", "aux_losses": True}
    settings = {
        "objective": objective,
        "max_steps": 1,
        "logging_steps": 1,
        "lora_plus_ratio": 8,
        "weight_decay": 0.1,
    }
    result = train(molora.load_config(run_file(MOLA, rows=ROWS, train=settings)), progress=False)
    (trainer,) = made
    assert (trainer.beta, trainer.loss_types, trainer.aux_losses) == (0.7, ["hinge"], True)
    rates = {
        g["name"]: (g["initial_lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups
    }
    assert rates["experts.B"] == (8 * rates["experts.A"][0], 0.1)
    assert lines(result.output_dir / "metrics.jsonl", "train")
    bare = train(
        molora.load_config(
            run_file(
                MOLA, rows=ROWS, train={"objective": "dpo", "max_steps": 1, "logging_steps": 1}
            )
        ),
        progress=False,
    )
    assert (made[1].beta, made[1].loss_types, made[1].aux_losses) == (0.1, ["sigmoid"], False)
    (line,) = lines(bare.output_dir / "metrics.jsonl", "train")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_preferences_after_supervised_training_start_with_its_mixture(
    run_file: Callable[..., Path], tmp_path: Path
) -> None:
    first = train(molora.load_config(run_file(MOLA)), progress=False)
    settings = {
        "objective": "dpo",
        "max_steps": 1,
        "logging_steps": 1,
        "start_from": str(first.output_dir / "adapter"),
    }
    path = run_file(MOLA, rows=ROWS, train=settings, output_dir=str(tmp_path / "second"))
    result = train(molora.load_config(path), progress=False)
    (line,) = lines(result.output_dir / "metrics.jsonl", "train")
    # the reference stays the base, from which the mixture is away already
    assert abs(line["loss"] - math.log(2)) > 1e-4


def test_the_shipped_configuration_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    small = save_chat_model(tmp_path / "model", num_hidden_layers=4, max_position_embeddings=512)
    given = molora.load_config("configs/dpo.yaml").model_dump(mode="json")
    given["model"]["name"] = str(small)
    given["data"]["max_length"] = 512  # the small model has a token per byte
    given["train"] |= {"max_steps": 2, "logging_steps": 1}
    for part in ("train", "eval"):
        given["data"][part][0]["rows"] = 8
    result = train(RunConfig.parse({**given, "output_dir": str(tmp_path / "out")}), progress=False)
    first = lines(result.output_dir / "metrics.jsonl", "train")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert "eval_rewards/margins" in result.metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"packing": True}}, r"data\.packing and train\.objective: dpo exclude"),
        (
            {"train": {"objective": {"kind": "dpo", "aux_losses": True}}, "losses": []},
            "aux_losses is set, but the mixture has no losses",
        ),
        ({"train_modules": ["lm_head"]}, r"train\.freeze: \[other\]"),
        ({"train": {"objective": {"kind": "dpo", "beta": 0}}}, r"beta: .*greater than 0"),
        ({"train": {"objective": {"kind": "dpo", "bta": 1}}}, "Close names: beta"),
        ({"train": {"objective": "pdo"}}, "'dpo'"),
    ],
)
def test_configurations_that_cannot_be_are_refused(
    run_file: Callable[..., Path], settings: dict[str, Any], message: str
) -> None:
    mixture = {n: settings.pop(n) for n in ("losses", "train_modules") if n in settings}
    settings = {"train": {"objective": "dpo"}, **settings}
    with pytest.raises(molora.ConfigError, match=message):
        molora.load_config(run_file({**MOLA, **mixture}, rows=ROWS, **settings))


def test_rows_of_the_other_kind_are_named(run_file: Callable[..., Path]) -> None:
    with pytest.raises(molora.DataError, match=r"rows\.jsonl, line 1: a preference needs"):
        train(molora.load_config(run_file(MOLA, train={"objective": "dpo"})), progress=False)
    with pytest.raises(molora.DataError, match=r"rows\.jsonl, line 1: .*train\.objective: dpo"):
        train(molora.load_config(run_file(MOLA, rows=ROWS)), progress=False)


def test_the_shipped_preferences_are_as_the_script_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.preferences import make_preferences

    make_preferences.main(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        shipped = ROOT / "examples" / "preferences" / name
        assert (tmp_path / name).read_bytes() == shipped.read_bytes()

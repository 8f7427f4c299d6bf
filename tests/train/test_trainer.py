"""The mixin: what is trained, saved, logged and refused."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_trainers
import torch
import transformers
import trl
from datasets import Dataset
from tiny_models import batch_for, sequences, tiny
from tiny_runs import ROWS, tokenizer
from tiny_trainers import LOSSES, arguments, dataset, mixture_on
from torch import Tensor, nn

import molora
from molora.config import (
    Capacity,
    Dropout,
    LinearSite,
    LoRA,
    TopK,
)
from molora.data import Collator
from molora.train import SFTTrainer, Trainer


def sft(mixture: molora.Mixture, tmp_path: Path, *, data: Dataset | None = None, **options: Any):
    keywords = {
        name: options.pop(name)
        for name in ("router_learning_rate", "eval_dataset", "data_collator", "optimizers")
        if name in options
    }
    return tiny_trainers.sft(mixture, tmp_path / "out", data=data, keywords=keywords, **options)


def same_rows() -> Dataset:
    """Eight times one row."""
    row = sequences([7])[0].tolist()
    return Dataset.from_dict({"input_ids": [row] * 8, "labels": [row] * 8})


def digest(model: nn.Module, *, of_base: bool) -> str:
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if of_base != (".experts." in name or ".router." in name):
            found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


# ---------------------------------------------------------------------- what is trained


def test_only_the_declared_set_is_trained(tmp_path: Path) -> None:
    mixture = mixture_on()
    base, ours = (digest(mixture.model, of_base=of_base) for of_base in (True, False))
    trainer = sft(mixture, tmp_path, max_steps=5, weight_decay=0.1)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for role in mixture.trainable_parameters().values() for p in role}
    assert digest(mixture.model, of_base=True) == base
    assert digest(mixture.model, of_base=False) != ours
    for name, parameter in mixture.model.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, name


def test_routers_have_a_learning_rate_of_their_own_and_no_decay(tmp_path: Path) -> None:
    mixture = mixture_on()
    trainer = sft(mixture, tmp_path, router_learning_rate=1e-4, weight_decay=0.1)
    trainer.train()
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    roles = mixture.trainable_parameters()
    assert {rates[id(p)] for p in roles["router"]} == {(1e-4, 0.0)}
    assert {rates[id(p)] for p in roles["experts"]} == {(1e-2, 0.1)}


def test_a_frozen_role_is_left_alone(tmp_path: Path) -> None:
    mixture = mixture_on()
    mixture.freeze("experts")
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    sft(mixture, tmp_path).train()
    changed = {name for name, t in mixture.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {name for name in before if name.endswith("router.weight")}


def test_a_base_parameter_that_gets_gradients_is_named(tmp_path: Path) -> None:
    mixture = mixture_on()
    mixture.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(molora.AttachError, match=r"requires_grad, undeclared: model\.norm\.weight"):
        sft(mixture, tmp_path).train()


@pytest.mark.parametrize("role", ["experts", "router"])
def test_an_optimiser_without_a_role_is_refused(role: str, tmp_path: Path) -> None:
    mixture = mixture_on()
    optimizer = torch.optim.AdamW(mixture.trainable_parameters()[role])
    with pytest.raises(molora.AttachError, match=r"not in the optimiser: model\.layers\.0"):
        sft(mixture, tmp_path, optimizers=(optimizer, None)).train()


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    mixture = mixture_on()
    mixture.freeze("experts")
    mixture.freeze("router")
    with pytest.raises(molora.AttachError, match="every role of the mixture is frozen"):
        sft(mixture, tmp_path).train()


def test_a_declared_head_is_trained_through_the_fused_loss(tmp_path: Path) -> None:
    mixture = mixture_on(train_modules=("lm_head",))
    before = mixture.model.lm_head.weight.detach().clone()
    sft(mixture, tmp_path).train()
    assert (mixture.model.lm_head.weight - before).abs().max() > 1e-3


# ---------------------------------------------------------------------- gradient checkpointing


class Counted:
    """Counts the forwards of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_gradient_checkpointing_changes_nothing(trainer: str, tmp_path: Path) -> None:
    # a shared decision, padding that takes no capacity and dropout: all must come back
    group = {
        "site": LinearSite(scope="block"),
        "select": Capacity(k=2, tokens=3, renormalize=True),
        "expert": LoRA(dropout=Dropout(p=0.2)),
    }
    states, layer_forwards = [], []
    for checkpointing in (False, True):
        mixture = mixture_on(group=group)
        start = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
        counted = Counted(mixture.model.model.layers[0].self_attn)
        options = {"activation_checkpointing": checkpointing, "max_steps": 3}
        if trainer == "trl":
            sft(mixture, tmp_path, **options).train()
        else:
            plain(mixture, tmp_path, **options).train()
        states.append({name: t.clone() for name, t in mixture.state_dict().items()})
        layer_forwards.append(counted.count)
    assert layer_forwards == [3, 6]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert all((states[0][name] - start[name]).abs().max() > 1e-3 for name in start)


def plain(
    mixture: molora.Mixture, tmp_path: Path, *, data: Dataset | None = None, **options: Any
) -> Trainer:
    kept = arguments(tmp_path / "out", **options).to_dict()
    known = {f for f in transformers.TrainingArguments.__dataclass_fields__ if f in kept}
    return Trainer(
        mixture.model,
        transformers.TrainingArguments(**{name: kept[name] for name in known}),
        mixture=mixture,
        train_dataset=data if data is not None else dataset(),
        data_collator=Collator(pad_token_id=2),
    )


def test_the_arguments_stay_writable_as_json(tmp_path: Path) -> None:
    trainer = sft(mixture_on(), tmp_path, activation_checkpointing=True)
    trainer.train()
    assert json.loads(trainer.args.to_json_string())["activation_checkpointing"] is True


# ---------------------------------------------------------------------- files


def test_checkpoints_hold_the_mixture_alone(tmp_path: Path) -> None:
    mixture = mixture_on()
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "save_total_limit": 1}
    sft(mixture, tmp_path, **options).train()
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == ["checkpoint-5"]
    files = sorted(path.name for path in (tmp_path / "out" / "checkpoint-5").iterdir())
    assert files == [
        "checkpoint.json",
        *[name for name in files if re.fullmatch(r"molora-[0-9a-f]{16}\.safetensors", name)],
        "molora.json",
        "run_state.json",
        *[name for name in files if re.fullmatch(r"trainer-[0-9a-f]{16}\.safetensors", name)],
        "trainer_state.json",
    ]
    loaded = molora.load(tiny("llama"), tmp_path / "out" / "checkpoint-5")
    torch.testing.assert_close(loaded.state_dict(), mixture.state_dict(), rtol=0, atol=0)


def test_save_model_writes_an_adapter_that_loads(tmp_path: Path) -> None:
    mixture = mixture_on()
    trainer = sft(mixture, tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = molora.load(tiny("llama"), tmp_path / "out" / "adapter")
    batch = batch_for(mixture.model)
    expected = mixture.model.eval()(**batch).logits
    assert torch.equal(loaded.model(**batch).logits, expected)
    with loaded.disabled():
        assert (loaded.model(**batch).logits - expected).abs().max() > 1e-2


# ---------------------------------------------------------------------- logs


class Recorder:
    """Counts the choices of the routers in the training forwards of a trainer."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.counts: dict[str, Tensor] = {}
        self.trainer = trainer
        self.compute_loss = trainer.compute_loss
        trainer.compute_loss = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.trainer.mixture.record() as records:
            loss = self.compute_loss(*args, **kwargs)
        for site, record in records.items() if self.trainer.model.training else ():
            chosen = record.expert_index[record.mask].flatten()
            counts = torch.bincount(chosen, minlength=4)
            self.counts[site] = self.counts.get(site, torch.zeros(4)) + counts
        return loss


def test_logs_say_what_the_routers_did_in_the_window(tmp_path: Path) -> None:
    mixture, data = mixture_on(), dataset()
    options = {"max_steps": 3, "logging_steps": 3, "gradient_accumulation_steps": 2}
    # evaluations lie inside the window, and take no part
    options |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 2}
    trainer = sft(mixture, tmp_path, data=data, eval_dataset=data, **options)
    recorder = Recorder(trainer)
    trainer.train()
    (line,) = (line for line in trainer.state.log_history if "loss" in line)
    loads = torch.stack([4 * counts / counts.sum() for counts in recorder.counts.values()])
    assert line["load_min"] == pytest.approx(loads.min().item())
    assert line["load_max"] == pytest.approx(loads.max().item())
    assert line["load_max"] > 1.2
    assert line["dead_experts"] == (loads == 0).sum()
    # 46 tokens an epoch of two steps
    assert 46 < line["tokens"] < 92
    assert line["tokens"] == trainer.tokens == line["num_tokens"]
    weighted = 0.5 * line["aux/load_balance"] + 0.1 * line["aux/router_z"]
    assert line["aux_loss"] == pytest.approx(weighted, rel=1e-5)
    assert 0.3 < line["aux_loss"] < line["loss"]
    assert line["grad_norm"] > 0


def test_a_line_is_the_mean_over_the_steps_since_the_line_before(tmp_path: Path) -> None:
    single, double = (
        [line for line in trained.state.log_history if "loss" in line]
        for trained in (logged(tmp_path, every=1), logged(tmp_path, every=2))
    )
    assert [line["tokens"] for line in double] == [46, 92]
    for name in ("loss", "aux_loss", "aux/load_balance", "aux/router_z"):
        steps = [line[name] for line in single]
        means = [(steps[0] + steps[1]) / 2, (steps[2] + steps[3]) / 2]
        assert [line[name] for line in double] == pytest.approx(means, rel=1e-5)
        assert steps[0] != pytest.approx(steps[1], rel=1e-3)


def logged(tmp_path: Path, *, every: int) -> SFTTrainer:
    trainer = sft(mixture_on(), tmp_path, max_steps=4, logging_steps=every)
    trainer.train()
    return trainer


def test_a_loss_that_is_a_mean_per_batch_is_averaged_with_its_auxiliary_losses(
    tmp_path: Path,
) -> None:
    outcomes = []
    for accumulate in (1, 4):
        mixture = mixture_on()
        trainer = plain(
            mixture,
            tmp_path,
            data=same_rows(),
            max_steps=1,
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
        )
        trainer.model_accepts_loss_kwargs = False  # as of models without **kwargs
        trainer.train()
        (line,) = (line for line in trainer.state.log_history if "loss" in line)
        outcomes.append([line[name] for name in ("loss", "aux_loss", "aux/router_z", "grad_norm")])
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-5)
    assert outcomes[0][1] > 0.5


def test_evaluations_do_not_count_as_training_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(trl.SFTTrainer, "evaluate", lambda self: take(100))
    trainer = sft(mixture_on(), tmp_path)
    take(3)
    trainer.evaluate()
    take(2)
    assert trainer.observation.seconds() == 5


def test_dead_experts_are_counted(tmp_path: Path) -> None:
    mixture = mixture_on(losses=(), group={"select": TopK(k=1, renormalize=False)})
    for name, tensor in mixture.state_dict().items():
        if name.endswith("router.weight"):
            tensor.zero_()  # ties go to the first expert
    trainer = sft(mixture, tmp_path, max_steps=1, learning_rate=1e-9)
    trainer.train()
    (line,) = (line for line in trainer.state.log_history if "loss" in line)
    assert line["dead_experts"] == 3 * 14
    assert (line["load_min"], line["load_max"]) == (0, 4)
    assert "aux_loss" not in line


# ---------------------------------------------------------------------- columns


def test_task_types_reach_the_mixture_through_trls_own_preparation(tmp_path: Path) -> None:
    rows = [{**row, "task_types": number % 2} for number, row in enumerate(ROWS)]
    mixture = molora.attach(tiny("llama"), molora.presets.loramoe(dropout=0.0))
    seen: list[Tensor] = []
    mixture.model.register_forward_pre_hook(
        lambda *given: seen.append(given[2]["task_types"]), with_kwargs=True, prepend=True
    )
    options = {"dataset_kwargs": None, "data_collator": None, "max_steps": 1}
    trainer = sft(mixture, tmp_path, data=Dataset.from_list(rows), **options)
    trainer.train()
    assert sorted(seen[0].tolist()) != [0, 0, 0, 0]
    assert seen[0].dtype == torch.int64
    (line,) = (line for line in trainer.state.log_history if "loss" in line)
    assert line["aux/localized_balance"] > 0


def test_loramoe_without_task_types_names_the_column(tmp_path: Path) -> None:
    mixture = molora.attach(tiny("llama"), molora.presets.loramoe())
    trainer = sft(mixture, tmp_path, eval_dataset=dataset())
    assert trainer.evaluate()["eval_loss"] > 0  # evaluation does not need them
    with pytest.raises(molora.AttachError, match="needs the column 'task_types'"):
        trainer.train()


def test_a_column_in_some_rows_only_is_an_error(tmp_path: Path) -> None:
    trainer = sft(mixture_on(), tmp_path, data_collator=None)
    examples = [{"input_ids": [3, 4], "labels": [3, 4]} for _ in range(2)]
    examples[0]["task_ids"] = 1
    with pytest.raises(molora.DataError, match="`task_ids` is in 1 of 2 examples"):
        trainer.data_collator(examples)


def test_evaluation_has_the_cross_entropy_alone(tmp_path: Path) -> None:
    found = []
    for losses in (LOSSES, ()):
        mixture = mixture_on(losses=losses)
        found.append(sft(mixture, tmp_path, eval_dataset=dataset()).evaluate()["eval_loss"])
    assert found[0] == found[1]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "re-entrant"),
        ({"activation_checkpointing_kwargs": {"selective": True}}, "'selective' takes the place"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"packing": True}, "Set data.packing in the YAML"),
        ({"padding_free": True}, "collate with molora.data.Collator"),
        ({"use_liger_kernel": True}, "experts then do nothing"),
        ({"push_to_hub": True}, "Upload what mixture.save wrote"),
    ],
)
def test_arguments_that_would_train_something_else_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(molora.ConfigError, match=message):
        sft(mixture_on(), tmp_path, **options)


def test_label_smoothing_is_fine_without_auxiliary_losses(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        trainer = sft(mixture_on(losses=()), tmp_path, label_smoothing_factor=0.1)
    trainer.train()
    assert trainer.state.global_step == 2


def test_optimisers_with_groups_of_their_own_are_refused(tmp_path: Path) -> None:
    trainer = sft(mixture_on(), tmp_path, optim="adafactor")
    trainer.train()  # an ordinary optimiser other than AdamW is fine
    assert type(trainer.optimizer.optimizer).__name__ == "Adafactor"
    other = sft(mixture_on(), tmp_path)
    other.optimizer_cls_and_kwargs = (torch.optim.SGD, {"params": [], "lr": 1.0})
    with pytest.raises(molora.ConfigError, match="makes its own groups of parameters"):
        other.train()


@pytest.mark.parametrize("name", ["peft_config", "compute_loss_func"])
def test_trainer_arguments_that_bypass_the_mixture_are_refused(name: str, tmp_path: Path) -> None:
    mixture = mixture_on()
    with pytest.raises(molora.ConfigError, match=name):
        SFTTrainer(
            mixture.model,
            arguments(tmp_path / "out"),
            mixture=mixture,
            train_dataset=dataset(),
            processing_class=tokenizer(),
            **{name: len},
        )


@pytest.mark.parametrize("cls", [SFTTrainer, Trainer])
def test_another_model_than_the_mixtures_is_refused(cls: Any, tmp_path: Path) -> None:
    with pytest.raises(molora.AttachError, match="not the one that carries the mixture"):
        cls(
            tiny("llama"),
            arguments(tmp_path / "out"),
            mixture=mixture_on(),
            train_dataset=dataset(),
        )


def test_experts_on_the_head_are_refused_by_trl_and_trained_by_the_plain_trainer(
    tmp_path: Path,
) -> None:
    mixture = mixture_on(group={"targets": ("q_proj", "lm_head")})
    with pytest.raises(molora.AttachError, match=r"lm_head has experts, but TRL multiplies"):
        sft(mixture, tmp_path)
    before = mixture.state_dict()["lm_head.experts.lora_B"].clone()
    plain(mixture, tmp_path).train()
    assert (mixture.state_dict()["lm_head.experts.lora_B"] - before).abs().max() > 1e-3

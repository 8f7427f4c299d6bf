"""Groups and frozen roles through the trainers and from a YAML file; the base stays as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tiny_models import batch_for, randomize, sequences, tiny
from tiny_runs import lines, tokenizer
from torch import Tensor, nn

import molora
from molora.data import Collator
from molora.train import SFTTrainer, Trainer, train
from molora.train.dry_run import dry_run

MOLA = {"preset": "mola", "num_experts": 4, "top_k": 2, "rank": 3, "dropout": 0.0}
RATES = {
    "router_learning_rate": 1e-3,
    "lora_plus_ratio": 4.0,
    "weight_decay_B": 0.2,
    "router_weight_decay": 0.3,
}


def dataset() -> Dataset:
    rows = [row.tolist() for row in sequences((9, 4, 6, 3, 8, 5, 7, 4))]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def trainer_on(mixture: molora.Mixture, folder: Path, kind: str = "trl", **options: Any) -> Any:
    rates = {name: options.pop(name) for name in RATES if name in options}
    settings = {
        "output_dir": str(folder / "out"),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        **options,
    }
    keywords = {
        "mixture": mixture,
        "train_dataset": dataset(),
        "data_collator": Collator(pad_token_id=2),
        **rates,
    }
    if kind == "transformers":
        return Trainer(mixture.model, transformers.TrainingArguments(**settings), **keywords)
    settings["dataset_kwargs"] = {"skip_prepare_dataset": True}
    arguments = trl.SFTConfig(**settings)
    return SFTTrainer(mixture.model, arguments, processing_class=tokenizer(), **keywords)


def mixture_on(model: nn.Module | None = None, **preset: Any) -> molora.Mixture:
    settings = {key: value for key, value in {**MOLA, **preset}.items() if key != "preset"}
    mixture = molora.attach(model or tiny("llama"), molora.presets.mola(**settings))
    randomize(mixture)
    return mixture


def base_tensors(mixture: molora.Mixture) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of the model that the mixture does not train, extras left out."""
    ours = {id(p) for _, p in mixture.named_parameters()}
    ours |= {id(b) for bank in mixture.built.banks.values() for b in bank.buffers()}
    yield from (
        (name, tensor)
        for named in (mixture.model.named_parameters(), mixture.model.named_buffers())
        for name, tensor in named
        if id(tensor) not in ours
    )


def digest(mixture: molora.Mixture) -> str:
    """SHA-256 over all bytes of the base: names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in base_tensors(mixture):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def values(mixture: molora.Mixture) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in mixture.state_dict().items()}


def changed(mixture: molora.Mixture, before: dict[str, Tensor]) -> set[str]:
    return {name for name, t in mixture.state_dict().items() if not torch.equal(t, before[name])}


# ---------------------------------------------------------------------- the base


@pytest.mark.parametrize("kind", ["trl", "transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_leaves_every_bit_of_the_base(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    mixture = mixture_on(tiny("llama").to(dtype))
    before, ours = digest(mixture), values(mixture)
    assert len(list(base_tensors(mixture))) == len(list(tiny("llama").parameters())) + 2
    trainer = trainer_on(mixture, tmp_path, kind, weight_decay=0.1, **RATES)
    trainer.train()
    assert digest(mixture) == before
    assert changed(mixture, ours) == ours.keys()
    assert all(tensor.grad is None for _, tensor in base_tensors(mixture))
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for _, p in mixture.named_parameters()}


def test_the_digest_sees_one_bit_of_any_tensor_of_the_base() -> None:
    mixture = mixture_on(tiny("llama").to(torch.bfloat16))
    before = digest(mixture)
    with torch.no_grad():
        for _, tensor in base_tensors(mixture):
            last = tensor.view(-1).view(torch.uint8)
            last[-1] ^= 1
            assert digest(mixture) != before
            last[-1] ^= 1
            assert digest(mixture) == before
        mixture.state_dict()["model.layers.0.mlp.up_proj.experts.lora_B"].zero_()
    assert digest(mixture) == before


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("kind", ["trl", "transformers"])
def test_every_rate_reaches_the_optimiser_and_the_schedule_scales_them_all(
    kind: str, tmp_path: Path
) -> None:
    mixture = mixture_on(train_modules=["lm_head"], train_tokens={"ids": [4, 9]})
    seen: list[dict[str, float]] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    trainer = trainer_on(
        mixture,
        tmp_path,
        kind,
        weight_decay=0.1,
        max_steps=4,
        lr_scheduler_type="linear",
        **RATES,
    )
    trainer.add_callback(Watch())
    trainer.train()
    peak = {
        "experts.A": 1e-2,
        "experts.B": 4e-2,
        "router": 1e-3,
        "other": 1e-2,
        "other.rows": 1e-2,
    }
    for step, rates in enumerate(seen):
        assert rates == pytest.approx({name: lr * (1 - step / 4) for name, lr in peak.items()})
    assert len(seen) == 4
    decays = {group["name"]: group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {
        "experts.A": 0.1,
        "experts.B": 0.2,
        "router": 0.3,
        "other": 0.1,
        "other.rows": 0.0,
    }


def test_every_rate_changes_what_is_trained(tmp_path: Path) -> None:
    """Each acts, and on its own role in the first step, when all gradients are still the same."""
    expected = {
        "router_learning_rate": ".router.weight",
        "lora_plus_ratio": "experts.lora_B",
        "weight_decay_B": "experts.lora_B",
        "router_weight_decay": ".router.weight",
    }
    plain = mixture_on()
    trainer_on(plain, tmp_path, max_steps=1).train()
    for name, value in RATES.items():
        mixture = mixture_on()
        trainer_on(mixture, tmp_path, max_steps=1, **{name: value}).train()
        found = changed(mixture, values(plain))
        assert found == {n for n in plain.state_dict() if n.endswith(expected[name])}, name


# ---------------------------------------------------------------------- stages


def test_stages_train_one_role_after_the_other(tmp_path: Path) -> None:
    """Experts with routers, then routers alone, then B alone, on one model in memory."""
    mixture = mixture_on()
    before = digest(mixture)
    for frozen, ending in (("A", ""), ("experts", "router.weight"), (None, "lora_B")):
        if frozen is None:
            mixture.freeze("experts", frozen=False)
            mixture.freeze("A")
            mixture.freeze("router")
        else:
            mixture.freeze(frozen)
        start = values(mixture)
        trainer = trainer_on(mixture, tmp_path, max_steps=2)
        trainer.train()
        wanted = {n for n in start if n.endswith(ending) and (ending or "lora_A" not in n)}
        assert changed(mixture, start) == wanted
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in mixture.model.parameters() if p.requires_grad}
    assert digest(mixture) == before


@pytest.mark.parametrize("roles", [["experts"], ["B"], ["B", "router"]])
def test_frozen_experts_that_add_nothing_are_refused(roles: list[Any], tmp_path: Path) -> None:
    mixture = molora.attach(tiny("llama"), molora.presets.mola(num_experts=4, rank=3))
    for role in roles:
        mixture.freeze(role)
    trainer = trainer_on(mixture, tmp_path)
    with pytest.raises(molora.AttachError, match="B is frozen while it is zero in all experts"):
        trainer.train()
    # the reason: the task's gradient is zero, in every step
    mixture = molora.attach(
        tiny("llama"), molora.presets.mola(num_experts=4, rank=3, losses=(), dropout=0.0)
    )
    mixture.freeze("B")
    mixture.model.train()(**batch_for(mixture.model)).loss.backward()
    learning = [p for ps in mixture.trainable_parameters().values() for p in ps]
    assert all((p.grad == 0).all() for p in learning)


# ---------------------------------------------------------------------- from a file


def test_rates_of_a_file_reach_the_optimiser(
    run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    create = SFTTrainer.create_optimizer
    monkeypatch.setattr(
        SFTTrainer,
        "create_optimizer",
        lambda self, *a, **k: kept.append(create(self, *a, **k)) or kept[-1],
    )
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "constant", **RATES}
    path = run_file(MOLA, train={**settings, "warmup_ratio": 0, "max_steps": 1})
    train(molora.load_config(path), progress=False)
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in kept[0].param_groups}
    assert found == {
        "experts.A": (1e-3, 0.1),
        "experts.B": (4e-3, 0.2),
        "router": (1e-3, 0.3),
    }
    path = run_file(MOLA, train={**settings, "router_learning_rate": 1e-4, "logging_steps": 1})
    result = train(molora.load_config(path), progress=False)
    assert {g["name"]: g["initial_lr"] for g in kept[-1].param_groups}["router"] == 1e-4
    # each group's is logged by its name, where they differ
    line = lines(result.output_dir / "metrics.jsonl", "train")[-1]
    logged = {name: rate for name, rate in line.items() if name.startswith("learning_rate/")}
    assert logged == {
        "learning_rate/experts.A": 1e-3,
        "learning_rate/experts.B": 4e-3,
        "learning_rate/router": 1e-4,
    }
    result = train(molora.load_config(run_file(MOLA)), progress=False)
    assert not any(
        "learning_rate/" in name for name in lines(result.output_dir / "metrics.jsonl", "train")[-1]
    )


def test_a_second_stage_from_files_trains_routers_alone(
    run_file: Callable[..., Path], tmp_path: Path
) -> None:
    first = train(molora.load_config(run_file(MOLA)), progress=False)
    before = values(first.mixture)
    second = {
        "train": {"freeze": ["experts"], "start_from": str(first.output_dir / "adapter")},
        "output_dir": str(tmp_path / "second"),
    }
    path = run_file({**MOLA, "losses": []}, **second)
    result = train(molora.load_config(path), progress=False)
    assert changed(result.mixture, before) == {n for n in before if n.endswith("router.weight")}
    (summary,) = lines(result.output_dir / "metrics.jsonl", "summary")
    assert summary["parameters"] == {
        "experts": 0,
        "router": result.mixture.num_parameters()["router"],
    }
    assert molora.load_config(result.output_dir / "config.yaml").train.freeze == ("experts",)
    # a dry run says what is trained, and reads no values
    planned = dry_run(molora.load_config(path))
    assert planned.parameters == summary["parameters"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"freeze": ["routers"]}, molora.ConfigError, r"train\.freeze\.0: .*'router'"),
        ({"lora_plus_ratio": 0}, molora.ConfigError, r"train\.lora_plus_ratio: .*greater than 0"),
        ({"router_weight_decay": -1}, molora.ConfigError, r"train\.router_weight_decay"),
        ({"freeze": ["other"]}, molora.AttachError, "nothing of it to freeze"),
        ({"freeze": ["B"]}, molora.AttachError, r"B is frozen while it is zero.*train\.start_from"),
        ({"freeze": ["experts", "router"]}, molora.AttachError, "every role .* is frozen"),
        ({"start_from": "nowhere"}, molora.CheckpointError, "nowhere is not a directory"),
    ],
)
def test_settings_that_cannot_be_are_errors(
    run_file: Callable[..., Path], settings: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(molora.load_config(run_file(MOLA, train=settings)), progress=False)

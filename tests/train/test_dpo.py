"""Preference training: its loss and gradient, its reference, and auxiliary losses."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from preference_trainers import CAPACITY, FFN, LINEAR, logged, mixture_on, pairs, trainer_on
from tiny_models import tiny
from tiny_runs import tokenizer
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, one_hot
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

import molora
from molora.config import Dropout, LoRA

# ---------------------------------------------------------------------- an independent DPO


def log_probability(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """log π(answer | prompt), of one sequence alone and without padding."""
    ids = torch.tensor([prompt + answer])
    log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(dim=-1)
    taken = log_probs.gather(1, ids[0, 1:, None]).squeeze(1)
    return taken[len(prompt) - 1 :].sum()


def preference_loss(
    kind: str, policy: nn.Module, base: nn.Module, rows: Sequence[dict[str, list[int]]]
) -> Tensor:
    """The mean over pairs of DPO's, SLiC's or IPO's loss at beta = 0.4."""
    losses = []
    for row in rows:
        ratios = []
        for name in ("chosen_ids", "rejected_ids"):
            with torch.no_grad():
                reference = log_probability(base, row["prompt_ids"], row[name])
            ratio = log_probability(policy, row["prompt_ids"], row[name]) - reference
            ratios.append(ratio / len(row[name]) if kind == "ipo" else ratio)
        difference = ratios[0] - ratios[1]
        losses.append(
            {
                "sigmoid": -logsigmoid(0.4 * difference),
                "hinge": (1 - 0.4 * difference).clamp_min(0),
                "ipo": (difference - 1 / 0.8) ** 2,
            }[kind]
        )
    return torch.stack(losses).mean()


def step_gradient(
    mixture: molora.Mixture, folder: Path, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """SGD with learning rate 1 moves by the gradient of one step; with the line it logged."""
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    sgd = torch.optim.SGD(mixture.parameter_groups(1.0), lr=1.0)
    trainer = trainer_on(mixture, folder, optimizers=(sgd, None), beta=0.4, **options)
    trainer.train()
    (line,) = logged(trainer)
    return {n: before[n] - t for n, t in mixture.state_dict().items()}, line


def gradients(mixture: molora.Mixture) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in mixture.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Greatest difference of any entry, relative to the largest entry of all."""
    assert one.keys() == other.keys()
    difference = max(float((one[name] - other[name]).abs().max()) for name in one)
    return difference / max(float(grad.abs().max()) for grad in other.values())


@pytest.mark.parametrize("group", [LINEAR, FFN, CAPACITY], ids=["linear", "ffn", "capacity"])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_loss_and_gradients_are_those_of_a_loop_over_sequences(
    kind: str, group: dict[str, Any], tmp_path: Path
) -> None:
    """All eight pairs in one batch or in four, padded: no padding counts, nor takes capacity."""
    mixture = mixture_on(losses=(), **group)
    preference_loss(kind, mixture.model.train(), tiny("llama"), list(pairs())).backward()
    expected = gradients(mixture)
    loss = preference_loss(kind, mixture.model, tiny("llama"), list(pairs())).item()
    for batch_size in (8, 2):
        found, line = step_gradient(
            mixture_on(losses=(), **group),
            tmp_path,
            loss_type=[kind],
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
        )
        assert distance(found, expected) < 1e-4
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
    # the comparison sees a reference that is another, and answers that are exchanged
    flipped = [
        {**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}
        for row in pairs()
    ]
    for base, rows in (
        (mixture_on(losses=(), **group).model, list(pairs())),
        (tiny("llama"), flipped),
    ):
        wrong = mixture_on(losses=(), **group)
        preference_loss(kind, wrong.model.train(), base, rows).backward()
        assert distance(gradients(wrong), expected) > 1e-2


# ---------------------------------------------------------------------- the reference


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_reference_is_the_bare_base_bit_for_bit(family: str, tmp_path: Path) -> None:
    """In the middle of training with dropout, whatever the experts are."""
    dropout = {"resid_pdrop": 0.3, "attn_pdrop": 0.3} if family == "gpt2" else {}
    group = {"expert": LoRA(dropout=Dropout(p=0.3))}
    mixture = mixture_on(tiny(family, **dropout), **group)
    trainer = trainer_on(mixture, tmp_path, disable_dropout=False)
    batch = next(iter(trainer.get_train_dataloader()))
    mixture.model.train()
    found = torch.cat(trainer.compute_ref_log_probs(mixture.model, batch))
    assert all(module.training for module in mixture.model.modules())

    base = tiny(family)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_probs = base(**given).logits[:, :-1].log_softmax(dim=-1)
    targets = labels[:, 1:]
    taken = log_probs.gather(2, targets.clamp_min(0)[..., None]).squeeze(2)
    torch.testing.assert_close(found, (taken * (targets != -100)).sum(dim=1))

    add_fused_lm_head(base)
    fused = base(**given, labels=labels, fused_lm_head=True).log_probs.sum(dim=1)
    assert torch.equal(found, fused)
    enabled = mixture.model.eval()(**given, labels=labels, fused_lm_head=True).log_probs
    assert (enabled.sum(dim=1) - found).abs().min() > 1e-2


def test_the_first_step_of_untrained_experts_has_the_loss_of_equal_models(tmp_path: Path) -> None:
    for trained in (False, True):
        mixture = mixture_on()
        for name, tensor in mixture.state_dict().items():
            if name.endswith("lora_B") and not trained:
                tensor.zero_()
        trainer = trainer_on(mixture, tmp_path)
        trainer.train()
        (line,) = logged(trainer)
        if trained:
            assert abs(line["loss"] - math.log(2)) > 1e-2
        else:
            assert line["loss"] == pytest.approx(math.log(2), abs=1e-7)
            assert line["rewards/margins"] == 0
            assert line["grad_norm"] > 0


def test_dropout_is_off_in_experts_too_unless_asked_for(tmp_path: Path) -> None:
    losses = {}
    for p, disable in ((0.0, True), (0.5, True), (0.5, False)):
        mixture = mixture_on(expert=LoRA(dropout=Dropout(p=p)), losses=())
        trainer = trainer_on(mixture, tmp_path, disable_dropout=disable)
        trainer.train()
        losses[p, disable] = logged(trainer)[0]["loss"]
    assert losses[0.5, True] == losses[0.0, True]
    assert abs(losses[0.5, False] - losses[0.0, True]) > 1e-3


def models_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())


def parameters_alive() -> int:
    gc.collect()
    held = {
        id(thing): thing.numel() for thing in gc.get_objects() if isinstance(thing, nn.Parameter)
    }
    return sum(held.values())


def test_no_second_model_is_in_memory(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    mixture = mixture_on(model)
    before = models_alive(), parameters_alive()
    few = pairs().map(lambda row: {name: [i % 60 for i in ids] for name, ids in row.items()})
    trainer = trainer_on(mixture, tmp_path, data=few)
    trainer.train()
    assert (models_alive(), parameters_alive()) == before
    assert trainer.ref_model is None
    del trainer
    mixture.detach()
    # TRL alone would load one
    theirs = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path), report_to="none", bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}]),
        processing_class=tokenizer(),
    )
    assert models_alive() > before[0]
    assert (
        parameters_alive()
        >= before[1] - mixture.num_parameters()["experts"] + model.num_parameters()
    )
    assert theirs.ref_model is not None


# ---------------------------------------------------------------------- auxiliary losses


def balance(record: molora.Routing) -> Tensor:
    valid = record.mask
    assert valid is not None
    hits = one_hot(record.expert_index[valid], 4).sum(dim=1).float()
    return 4 * (hits.sum(dim=0) / hits.sum() * record.scores[valid].mean(dim=0)).sum()


def test_auxiliary_losses_take_no_part_unless_asked_for(tmp_path: Path) -> None:
    without, line = step_gradient(mixture_on(losses=()), tmp_path)
    by_default, line_by_default = step_gradient(mixture_on(), tmp_path)
    assert distance(by_default, without) == 0
    assert line["loss"] == line_by_default["loss"]
    assert "aux_loss" not in line_by_default
    asked, line_asked = step_gradient(mixture_on(), tmp_path, aux_losses=True)
    assert distance(asked, without) > 1e-2
    assert line_asked["loss"] == pytest.approx(line["loss"] + line_asked["aux_loss"], rel=1e-5)
    assert line_asked["aux_loss"] == pytest.approx(0.5 * line_asked["aux/load_balance"], rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_auxiliary_losses_are_of_all_tokens_of_both_answers_and_of_no_padding(
    accumulate: int, tmp_path: Path
) -> None:
    """Each micro-batch's counts by its share of the pairs, as its preference loss does."""
    found, line = step_gradient(
        mixture_on(),
        tmp_path,
        aux_losses=True,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
    )
    mixture = mixture_on(losses=())
    trainer = trainer_on(
        mixture, tmp_path, per_device_train_batch_size=8 // accumulate, learning_rate=0.0
    )
    model, rows = mixture.model.train(), list(pairs())
    total = torch.zeros(())
    for batch in trainer.get_train_dataloader():
        with mixture.record(detach=False) as records:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert {int(r.mask.sum()) for r in records.values()} == {int(batch["attention_mask"].sum())}
        site_means = torch.stack([balance(record) for record in records.values()]).mean()
        total = total + 0.5 * site_means / accumulate
    (preference_loss("sigmoid", model, tiny("llama"), rows) + total).backward()
    assert distance(found, gradients(mixture)) < 1e-4
    assert line["aux_loss"] == pytest.approx(total.item(), rel=1e-5)
    tokens = sum(
        2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows
    )
    assert line["tokens"] == tokens


def test_task_types_are_needed_for_losses_alone_and_reach_both_answers(tmp_path: Path) -> None:
    def loramoe() -> molora.Mixture:
        return molora.attach(tiny("llama"), molora.presets.loramoe(num_experts=4, rank=3))

    trainer_on(loramoe(), tmp_path).train()
    with pytest.raises(molora.AttachError, match="needs the column 'task_types'"):
        trainer_on(loramoe(), tmp_path, aux_losses=True).train()
    mixture, seen = loramoe(), []
    mixture.model.register_forward_pre_hook(
        lambda *given: seen.append(given[2]["task_types"]), with_kwargs=True, prepend=True
    )
    data = pairs(task_types=[0, 1, 1, 0, 1, 0, 0, 1])
    trainer = trainer_on(mixture, tmp_path, data=data, aux_losses=True)
    trainer.train()
    assert len(seen) == 2  # the reference's and the mixture's forward
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][:4], seen[0][4:])
    assert len(set(seen[0].tolist())) == 2
    assert logged(trainer)[0]["aux/localized_balance"] > 0

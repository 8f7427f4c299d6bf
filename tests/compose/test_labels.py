"""Routers that are told which expert a sequence belongs to: MeteoRA's and MoA's label loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import RAGGED, load_set
from packed_batches import order_of_packed, ordinary, packed
from tiny_models import batch_for, tiny
from torch import nn

import molora
from molora.errors import AttachError, ConfigError

LABELS = torch.tensor([2, 0, -100])
ROUTERS: dict[str, Any] = {
    "meteora": {"kind": "meteora", "label_loss": 50.0},
    "moa": "moa",
    "moa over all": {"kind": "moa", "top_k": "all", "label_loss": 0.5},
}


def composed(tmp_path: Path, router: Any, **options: Any) -> tuple[nn.Module, molora.Mixture]:
    model = tiny("llama")
    return model, molora.compose(model, load_set(tmp_path, RAGGED), router=router, **options)


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_loss_is_that_of_every_routers_logits(tmp_path: Path, kind: str) -> None:
    model, mixture = composed(tmp_path, ROUTERS[kind])
    batch = batch_for(model)
    with mixture.record() as records:
        out = model.train()(**batch, expert_labels=LABELS)
    expected = []
    for record in records.values():
        logits_BSE = record.logits.view(*batch["input_ids"].shape, -1)
        rows = [
            nn.functional.cross_entropy(logits_E[None], LABELS[b][None])
            for b in range(2)
            for s, logits_E in enumerate(logits_BSE[b])
            if batch["attention_mask"][b, s] and logits_E[LABELS[b]].isfinite()
        ]
        expected.append(torch.stack(rows).mean() if rows else torch.zeros(()))
    coefficient = {"meteora": 50.0, "moa": 1.0, "moa over all": 0.5}[kind]
    torch.testing.assert_close(out.aux_loss, coefficient * torch.stack(expected).mean())
    assert out.aux_loss > 0.1


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_learn_the_labels_and_need_none_afterwards(tmp_path: Path, kind: str) -> None:
    experts = load_set(tmp_path)
    model = tiny("llama")
    mixture = molora.compose(model, experts, router=ROUTERS[kind])
    batch = batch_for(model, (7, 7, 7))
    labels = torch.tensor([2, 0, 1])

    def share() -> float:
        with torch.no_grad(), mixture.record() as records:
            model.eval()(**batch)
        best = [record.scores.argmax(dim=-1) for record in records.values()]
        return float((torch.stack(best) == labels.repeat_interleave(7)).float().mean())

    assert share() < 0.55
    optimiser = torch.optim.Adam(mixture.parameter_groups(5e-2))
    for _ in range(60):
        model.train()(**batch, expert_labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert share() > 0.7
    with torch.no_grad(), mixture.record() as records:
        model.eval()(**batch)
    if kind == "moa":
        assert all(torch.equal(r.gates, torch.ones_like(r.gates)) for r in records.values())
        assert all(name.count(".") == 2 for name in records)


def test_training_without_labels_is_refused_and_evaluation_not(tmp_path: Path) -> None:
    model, mixture = composed(tmp_path, "moa")
    with pytest.raises(AttachError, match="expert_labels"):
        model.train()(**batch_for(model))
    assert model.eval()(**batch_for(model)).loss.isfinite()
    with mixture.without_aux():
        model.train()(**batch_for(model))
    with mixture.context(expert_labels=LABELS):
        assert model(**batch_for(model)).aux_loss > 0


def test_packed_rows_have_the_same_loss(tmp_path: Path) -> None:
    model, _ = composed(tmp_path, ROUTERS["meteora"])
    labels = torch.tensor([0, 1, 2, -100, 0, 3])
    model.train()
    apart = model(**ordinary(), expert_labels=labels)
    order = torch.tensor(order_of_packed())
    together = model(**packed(), expert_labels=labels[order])
    torch.testing.assert_close(together.aux_loss, apart.aux_loss, rtol=1e-4, atol=1e-5)
    other = model(**packed(), expert_labels=labels)
    assert (other.aux_loss - apart.aux_loss).abs() > 1e-2


def test_experts_of_a_mixture_of_loras_may_be_trained_on(tmp_path: Path) -> None:
    model, mixture = composed(tmp_path, "moa", trainable=[*RAGGED])
    assert mixture.num_parameters()["experts"] > 0
    model.train()(**batch_for(model), expert_labels=LABELS).loss.backward()
    for parameters in mixture.trainable_parameters().values():
        assert all(p.grad is not None for p in parameters)


def test_meteora_has_no_label_loss_unless_asked(tmp_path: Path) -> None:
    model, mixture = composed(tmp_path, "meteora")
    assert mixture.config.losses == ()
    model.train()(**batch_for(model)).loss.backward()


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ({"kind": "moa", "label_loss": 0}, {}, "would never learn"),
        ({"kind": "moa", "top_k": 2}, {}, "takes 1 or 'all'"),
        (
            "linear",
            {"losses": [{"term": {"kind": "task_cross_entropy"}, "scope": "layer"}]},
            "task cross entropy loss needs the rows of one site",
        ),
    ],
)
def test_what_cannot_learn_from_labels_is_refused(
    tmp_path: Path, router: Any, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(tmp_path, router, **options)

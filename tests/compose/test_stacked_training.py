"""Routers learn over experts of a base's stacked weights, which stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from frozen_sets import load_set, logits
from stacked_sets import RAGGED, SAME, UP, Gates, close, compose, reference
from tiny_models import batch_for
from tiny_trainers import sft
from torch import Tensor

import molora


def _learned(weights: Mapping[str, Tensor], top_k: int) -> Gates:
    """softmax over the k largest logits of the router of a linear or of a module of parameters."""

    def gates(path: str, x: Tensor) -> Tensor:
        owner = path if f"{path}.router.weight" in weights else path.rpartition(".")[0]
        logits_TE = x @ weights[f"{owner}.router.weight"].to(x).T
        values, index = logits_TE.softmax(-1).topk(top_k)
        return torch.zeros_like(logits_TE).scatter(-1, index, values / values.sum(-1, keepdim=True))

    return gates


def test_learned_routers_read_the_hidden_states_and_get_the_gradient_of_the_dense_sum(
    tmp_path: Path,
) -> None:
    experts = load_set(
        tmp_path, {name: RAGGED[name] for name in ("math", "code", "law")}, "mixtral"
    )
    mixture = compose("mixtral", experts, {"kind": "linear", "top_k": 2}, missing="zero")
    routers = {n: p for n, p in mixture.named_parameters() if n.endswith("router.weight")}
    assert f"model.layers.0.{UP.rpartition('.')[0]}.router.weight" in routers
    with torch.no_grad():
        for parameter in routers.values():
            parameter.normal_(std=0.3)
    batch = batch_for(mixture.model, labels=False)
    ours = mixture.model(**batch).logits
    leaves = {n: p.detach().double().requires_grad_() for n, p in routers.items()}
    expected = reference(experts, _learned(leaves, 2), **batch)
    close(ours.detach(), expected.detach())
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, leaf in leaves.items():
        grad = routers[name].grad
        assert grad is not None
        assert leaf.grad is not None
        assert leaf.grad.norm() > 0.1, name
        assert (grad - leaf.grad).norm() < 1e-4 * leaf.grad.norm(), name
    others = [p for n, p in mixture.model.named_parameters() if "router" not in n]
    assert all(p.grad is None for p in others)


def test_recomputed_layers_give_the_same_gradients(tmp_path: Path) -> None:
    experts = load_set(tmp_path, SAME, "mixtral")
    found = []
    for checkpointed in (False, True):
        mixture = compose("mixtral", experts, "lora_flow", missing="zero")
        model: Any = mixture.model.train()
        if checkpointed:
            settings = {"use_reentrant": False, "context_fn": molora.checkpoint_context}
            model.gradient_checkpointing_enable(settings)
        batch = batch_for(model)
        model(**batch).loss.backward()
        found.append([p.grad for p in mixture.trainable_parameters()["router"]])
    for plain, again in zip(*found, strict=True):
        assert plain.norm() > 0
        torch.testing.assert_close(again, plain)


def test_a_trainer_changes_routers_and_nothing_else(tmp_path: Path) -> None:
    experts = load_set(tmp_path, RAGGED, "mixtral")
    mixture = compose("mixtral", experts, {"kind": "linear", "top_k": 2}, missing="zero")
    base = {n: p.clone() for n, p in mixture.model.named_parameters() if "lora" not in n}
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    with mixture.disabled():
        expected = logits(mixture.model)
    trainer = sft(mixture, tmp_path / "run")
    trainer.train()
    after = mixture.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) != ("router" in name), name
    frozen = {n for n in base if "router" not in n}
    parameters = dict(mixture.model.named_parameters())
    assert all(torch.equal(parameters[name], base[name]) for name in frozen)
    mixture.model.eval()
    with mixture.disabled():
        assert torch.equal(logits(mixture.model), expected)

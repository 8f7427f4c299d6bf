"""What is trained, what is not, and whether the router learns (B-1, B-24)."""

from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn

import molora
from molora.config import MixtureConfig
from molora.presets import mixlora, mola

EXPERTS = {"num_experts": 3, "rank": 5}


def group(**settings: Any) -> MixtureConfig:
    return MixtureConfig.parse({"groups": [{**EXPERTS, **settings}]})


ROUTED = [
    pytest.param(group(select={"kind": "dense"}), id="dense"),
    pytest.param(group(select={"kind": "top_k", "k": 2}), id="top_k"),
    pytest.param(group(select={"kind": "top_k", "k": 1, "renormalize": False}), id="top_1"),
    pytest.param(group(select={"kind": "top_p", "p": 0.6}), id="top_p"),
    pytest.param(
        group(score={"kind": "sigmoid"}, select={"kind": "threshold", "threshold": 0.5}),
        id="threshold",
    ),
    pytest.param(
        group(select={"kind": "capacity", "k": 2, "tokens": 3, "renormalize": True}),
        id="capacity",
    ),
    pytest.param(group(site={"kind": "linear", "scope": "block"}), id="block"),
    pytest.param(group(site={"kind": "linear", "scope": "layer"}), id="layer"),
    pytest.param(mixlora(**EXPERTS, dropout=0.0, losses=()), id="ffn"),
]


def adapted(config: MixtureConfig, family: str = "llama") -> tuple[nn.Module, molora.Mixture]:
    model = tiny(family)
    return model.train(), molora.attach(model, config)


def routers(mixture: molora.Mixture) -> dict[str, nn.Parameter]:
    return {name: site.router.weight for name, site in mixture.built.sites.items()}


@pytest.mark.parametrize("config", ROUTED)
def test_the_task_loss_alone_reaches_every_router(config: MixtureConfig) -> None:
    model, mixture = adapted(config)
    randomize(mixture)
    batch = batch_for(model)
    predicts = (nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100).flatten()
    with mixture.record() as records:
        model(**batch).loss.backward()
    for name, weight in routers(mixture).items():
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().max() > 1e-6, name
        # every expert that acts on a token that predicts another learns
        acting = (records[name].dense_gates()[predicts] > 0).any(dim=0)
        assert (weight.grad.abs().sum(dim=1) > 0)[acting].all()


@pytest.mark.parametrize("config", ROUTED[:3])
def test_while_b_is_zero_it_reaches_none(config: MixtureConfig) -> None:
    """All experts give 0, so it does not matter to whom a token goes: known, at step 0 only."""
    model, mixture = adapted(config)
    optimiser = torch.optim.SGD(mixture.parameter_groups(0.1))
    model(**batch_for(model)).loss.backward()
    assert all((weight.grad == 0).all() for weight in routers(mixture).values())
    optimiser.step()
    model(**batch_for(model)).loss.backward()
    assert all(weight.grad.abs().max() > 0 for weight in routers(mixture).values())


@pytest.mark.parametrize(
    "select",
    [
        {"kind": "top_k", "k": 1},
        {"kind": "unit_top1"},
        {"kind": "capacity", "renormalize": True},
        {"kind": "top_k", "k": [2, 1]},
    ],
    ids=["top_k", "unit_top1", "capacity", "one_layer"],
)
def test_a_router_that_could_never_learn_is_refused(select: dict[str, Any]) -> None:
    with pytest.raises(molora.ConfigError, match=r"would never learn\. Use renormalize=False"):
        group(select=select)


def test_a_balance_loss_teaches_a_router_of_unit_gates() -> None:
    """And the task loss does not: the reason for the refusal above."""
    settings = {"groups": [{**EXPERTS, "select": {"kind": "unit_top1"}}], "losses": [{}]}
    model, mixture = adapted(MixtureConfig.parse(settings))
    randomize(mixture)
    with mixture.deferred_aux() as deferred:
        model(**batch_for(model)).loss.backward(retain_graph=True)
    assert all(weight.grad is None for weight in routers(mixture).values())
    deferred.weighted(None).backward()
    assert all(weight.grad.abs().max() > 0 for weight in routers(mixture).values())


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("llama", mola(**EXPERTS), id="llama-mola"),
        pytest.param("gpt2", mixlora(**EXPERTS), id="gpt2-mixlora"),
        pytest.param("t5", mola(**EXPERTS, train_modules=["lm_head"]), id="t5-lm_head"),
    ],
)
def test_only_the_mixture_is_trained(family: str, config: MixtureConfig) -> None:
    model, mixture = adapted(config, family)
    optimiser = torch.optim.AdamW(mixture.parameter_groups(1e-2, weight_decay=0.1))
    optimised = {id(p) for g in optimiser.param_groups for p in g["params"]}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert optimised == {id(p) for p in trainable.values()}
    ours = {n for n in trainable if ".experts.lora_" in n or n.endswith(".router.weight")}
    assert ours == mixture.state_dict().keys() - {"lm_head.weight"}
    # T5's head is tied to its embedding, whose name is the first
    assert trainable.keys() - ours == ({"shared.weight"} if family == "t5" else set())

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for seed in range(5):
        model(**batch_for(model, seed=seed)).loss.backward()
        optimiser.step()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trainable)
        optimiser.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trainable)


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    _, mixture = adapted(mola(**EXPERTS))
    randomize(mixture)
    own: dict[str, Tensor] = {n: t.clone() for n, t in mixture.state_dict().items()}
    name = "model.layers.0.mlp.up_proj.experts.lora_B"
    wrong = {n: torch.zeros_like(t) for n, t in own.items() if n != name}
    for state, message in (
        (wrong, f"missing {name}"),
        (wrong | {name: own[name], "x": own[name]}, "unexpected x"),
        (
            wrong | {name: own[name].transpose(1, 2)},
            rf"{name} has shape \(3, 5, 40\), the mixture needs \(3, 40, 5\)",
        ),
    ):
        with pytest.raises(molora.CheckpointError, match=message):
            mixture.load_state_dict(state)
        assert all(torch.equal(t, own[n]) for n, t in mixture.state_dict().items())
    mixture.load_state_dict(wrong | {name: torch.ones_like(own[name])})
    assert all((t == (n == name)).all() for n, t in mixture.state_dict().items())

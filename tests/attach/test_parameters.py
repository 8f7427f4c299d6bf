"""Roles: groups for an optimiser, freezing, and that freezing one role changes no other (B-24)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn

import molora
from molora.attach import parameters
from molora.attach.extras import Extras
from molora.config import MixtureConfig
from molora.experts import Block, ExpertBank
from molora.kernels import backend
from molora.presets import lora, mixlora, mola

EXPERTS = {"num_experts": 3, "rank": 5}
SHARED_A = MixtureConfig.parse(
    {"groups": [{**EXPERTS, "expert": {"kind": "shared_a"}, "select": {"kind": "top_k", "k": 2}}]}
)
FORMS = [
    pytest.param(mola(**EXPERTS, top_k=2, dropout=0.0), id="mola"),
    pytest.param(mixlora(**EXPERTS, dropout=0.0), id="mixlora"),
    pytest.param(SHARED_A, id="shared_a"),
]


@pytest.fixture
def mixture() -> molora.Mixture:
    config = mola(**EXPERTS, train_modules=["lm_head"], train_tokens={"ids": [4, 9]})
    return molora.attach(tiny("llama"), config)


def named(mixture: molora.Mixture, **rates: Any) -> dict[str, tuple[float, float]]:
    """Group → learning rate and weight decay."""
    groups = mixture.parameter_groups(1e-3, **rates)
    return {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}


# ---------------------------------------------------------------------- groups


def test_groups_hold_every_parameter_once(mixture: molora.Mixture) -> None:
    groups = {g["name"]: g["params"] for g in mixture.parameter_groups(1e-3)}
    state = mixture.state_dict()
    assert {name: len(ps) for name, ps in groups.items()} == {
        "experts.A": 14,
        "experts.B": 14,
        "router": 14,
        "other": 1,
        "other.rows": 1,
    }
    for name, factor in (("experts.A", "lora_A"), ("experts.B", "lora_B"), ("router", "weight")):
        middle = "router" if name == "router" else "experts"
        held = {p.data_ptr() for p in groups[name]}
        assert held == {t.data_ptr() for n, t in state.items() if n.endswith(f".{middle}.{factor}")}
    assert groups["other.rows"] == list(mixture.extras.row_parameters.values())
    everything = [id(p) for ps in groups.values() for p in ps]
    assert len(set(everything)) == len(everything)
    roles = mixture.trainable_parameters()
    assert sorted(everything) == sorted(id(p) for ps in roles.values() for p in ps)


def test_without_settings_all_learn_alike_and_nothing_decays(mixture: molora.Mixture) -> None:
    assert set(named(mixture).values()) == {(1e-3, 0.0)}


def test_each_rate_reaches_its_own_groups(mixture: molora.Mixture) -> None:
    found = named(
        mixture,
        router_learning_rate=2e-4,
        lora_plus_ratio=16,
        weight_decay=0.1,
        weight_decay_B=0.2,
        router_weight_decay=0.3,
    )
    assert found == {
        "experts.A": (1e-3, 0.1),
        "experts.B": (16e-3, 0.2),
        "router": (2e-4, 0.3),
        "other": (1e-3, 0.1),
        "other.rows": (1e-3, 0.0),
    }
    assert named(mixture, weight_decay=0.1)["experts.B"] == (1e-3, 0.1)
    assert named(mixture, weight_decay=0.1)["router"] == (1e-3, 0.0)
    assert named(mixture, router_learning_rate=0.0)["router"] == (0.0, 0.0)


def test_lora_plus_is_pefts_apart_from_embeddings() -> None:
    """After three steps each, the factors are PEFT's; at another ratio they are not."""
    model = tiny("llama").train()
    mixture = molora.attach(model, lora(rank=5, alpha=15.0, targets=["q_proj", "o_proj"]))
    randomize(mixture)
    settings = peft.LoraConfig(r=5, lora_alpha=15.0, target_modules=["q_proj", "o_proj"])
    reference = peft.get_peft_model(tiny("llama"), settings).train()
    theirs = {
        name.split("base_model.model.")[1].replace(".default.weight", ""): p
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    for name, tensor in mixture.state_dict().items():
        theirs[name.replace(".experts.", ".")].data = tensor[0].clone()
    start = {name: p.detach().clone() for name, p in theirs.items()}
    ours = torch.optim.AdamW(mixture.parameter_groups(1e-3, lora_plus_ratio=16, weight_decay=0.1))
    expected = create_loraplus_optimizer(
        reference, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    for seed in range(3):
        for m, optimizer in ((model, ours), (reference, expected)):
            m(**batch_for(model, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in mixture.state_dict().items():
        peer = theirs[name.replace(".experts.", ".")]
        torch.testing.assert_close(tensor[0], peer.data, rtol=1e-4, atol=1e-6)
        moved = (peer - start[name.replace(".experts.", ".")]).abs().max()
        # three steps of Adam go about three learning rates far
        assert (moved > 30e-3) == name.endswith("lora_B")


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"lora_plus_ratio": 0}, "lora_plus_ratio=0: B would never change"),
        ({"lora_plus_ratio": -2}, "lora_plus_ratio=-2: it must be a finite number"),
        ({"router_learning_rate": float("nan")}, "router_learning_rate=nan"),
        ({"router_weight_decay": -0.1}, "router_weight_decay=-0.1"),
        ({"weight_decay_B": float("inf")}, "weight_decay_B=inf"),
    ],
)
def test_impossible_rates_are_errors(
    mixture: molora.Mixture, rates: dict[str, float], message: str
) -> None:
    with pytest.raises(molora.ConfigError, match=message):
        mixture.parameter_groups(1e-3, **rates)


def test_a_plain_lora_has_no_router_group() -> None:
    mixture = molora.attach(tiny("llama"), lora(rank=5))
    assert [(g["name"], len(g["params"])) for g in mixture.parameter_groups(1e-3)] == [
        ("experts.A", 14),
        ("experts.B", 14),
    ]
    assert mixture.num_parameters()["router"] == 0


# ---------------------------------------------------------------------- roles of factors


@pytest.mark.parametrize("config", FORMS)
def test_every_parameter_of_every_form_has_one_role(config: MixtureConfig) -> None:
    mixture = molora.attach(tiny("llama"), config)
    for bank in mixture.built.banks.values():
        factors = list(bank.factors())
        assert sorted(id(p) for _, p in factors) == sorted(id(p) for p in bank.parameters())
        assert {role for role, _ in factors} == {"A", "B"}
        assert dict(factors)["A"] is bank.lora_A


def test_blocks_declared_frozen_stay_so() -> None:
    def block(rank: int, *, trainable: bool) -> Block:
        return Block(torch.randn(2, rank, 7), torch.randn(2, 6, rank), torch.ones(2), trainable)

    bank = ExpertBank(
        [block(3, trainable=False), block(4, trainable=True)], backend=backend("dense")
    )
    assert [(role, p.shape) for role, p in bank.factors()] == [
        ("A", (2, 4, 7)),
        ("B", (2, 6, 4)),
    ]
    mixture = molora.attach(tiny("llama"), lora(rank=5))
    built, extras = mixture.built, Extras(nn.Linear(2, 2), mixture.config)
    built.banks.clear()
    built.banks["imported"] = bank
    for frozen in (True, False):
        parameters.freeze(built, extras, "experts", frozen=frozen)
        assert [p.requires_grad for p in bank.parameters()] == [False, False] + 2 * [not frozen]


# ---------------------------------------------------------------------- freezing


def test_counts_are_of_what_is_trained(mixture: molora.Mixture) -> None:
    per_layer = [(32, 48), (32, 24), (32, 24), (48, 32), (32, 40), (32, 40), (40, 32)]
    A, B = (2 * 3 * 5 * sum(shape[side] for shape in per_layer) for side in (0, 1))
    counts = {
        "experts": A + B,
        "router": 2 * 3 * sum(i for i, _ in per_layer),
        "other": 96 * 32 + 2 * 32,  # the whole head, and two rows of the embedding
    }
    assert mixture.num_parameters() == counts
    mixture.freeze("other")
    assert mixture.num_parameters() == {"experts": A + B, "router": counts["router"]}
    mixture.freeze("A")
    assert mixture.num_parameters() == {"experts": B, "router": counts["router"]}


ROLES: dict[str, Callable[[str], bool]] = {
    "experts": lambda name: ".experts." in name,
    "A": lambda name: name.endswith("experts.lora_A"),
    "B": lambda name: name.endswith("experts.lora_B"),
    "router": lambda name: name.endswith("router.weight"),
    "other": lambda name: ".experts." not in name and not name.endswith("router.weight"),
}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of one training step's loss, auxiliary losses included."""
    model.train()
    model.zero_grad()
    model(**batch_for(model)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("role", ROLES)
def test_a_frozen_role_gets_no_gradient_until_it_is_thawed(
    mixture: molora.Mixture, role: Any
) -> None:
    randomize(mixture)
    every = gradients(mixture.model)
    mixture.freeze(role)
    found = gradients(mixture.model)
    assert every.keys() - found.keys() == {name for name in every if ROLES[role](name)}
    held = {id(p) for g in mixture.parameter_groups(1e-3) for p in g["params"]}
    assert held == {id(p) for n, p in mixture.model.named_parameters() if n in found}
    mixture.freeze(role, frozen=False)
    assert gradients(mixture.model).keys() == every.keys()


@pytest.mark.parametrize("config", FORMS)
@pytest.mark.parametrize("role", ["A", "B", "experts", "router"])
def test_freezing_a_role_leaves_the_gradients_of_the_others_bit_equal(
    config: MixtureConfig, role: Any
) -> None:
    mixture = molora.attach(tiny("llama"), config)
    randomize(mixture)
    every = gradients(mixture.model)
    mixture.freeze(role)
    found = gradients(mixture.model)
    assert 0 < len(found) < len(every)
    for name, gradient in found.items():
        assert torch.equal(gradient, every[name]), name
        assert gradient.abs().max() > 0
    # the comparison can fail: other factors give other gradients
    for bank in mixture.built.banks.values():
        bank.lora_A.data.mul_(1.1)
    other = gradients(mixture.model)
    assert all(not torch.equal(gradient, found[name]) for name, gradient in other.items())


def test_the_last_word_on_overlapping_roles_counts(mixture: molora.Mixture) -> None:
    mixture.freeze("experts")
    mixture.freeze("B", frozen=False)
    assert set(named(mixture)) == {"experts.B", "router", "other", "other.rows"}
    mixture.freeze("experts", frozen=False)
    assert "experts.A" in named(mixture)


def test_nothing_left_to_train_is_an_error(mixture: molora.Mixture) -> None:
    for role in ("A", "B", "router", "other"):
        mixture.parameter_groups(1e-3)
        mixture.freeze(role)
    with pytest.raises(molora.AttachError, match="every role of the mixture is frozen"):
        mixture.parameter_groups(1e-3)


def test_an_unknown_role_is_an_error(mixture: molora.Mixture) -> None:
    with pytest.raises(molora.AttachError, match=r"unknown role 'routers'\. Close names: router"):
        mixture.freeze("routers")  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["router", "other"])
def test_a_role_that_the_mixture_has_nothing_of_is_an_error(role: Any) -> None:
    mixture = molora.attach(tiny("llama"), lora(rank=5))
    with pytest.raises(molora.AttachError, match=rf"role '{role}': .* It has experts, A, B\."):
        mixture.freeze(role)

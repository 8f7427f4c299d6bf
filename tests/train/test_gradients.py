"""Norms by role and site, against norms made by hand; shares of ranks are added up."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import nn

import molora
from molora.config import MixtureConfig
from molora.train.gradients import GradientNorms

DEVICE = torch.device("cpu")
CONFIG = MixtureConfig.parse(
    {
        "groups": [
            {"num_experts": 3, "rank": 5, "targets": "ffn", "site": {"kind": "ffn"}},
            {"num_experts": 4, "rank": 3, "targets": ["q_proj"]},
            {"num_experts": 1, "rank": 3, "targets": ["o_proj"]},
        ],
        "train_modules": ["lm_head"],
    }
)


@pytest.fixture
def mixture() -> molora.Mixture:
    model = tiny("llama").train()
    mixture = molora.attach(model, CONFIG)
    randomize(mixture)
    model(**batch_for(model)).loss.backward()
    return mixture


def norm(parameters: list[nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))


def of(mixture: molora.Mixture, *parts: str) -> list[nn.Parameter]:
    return [p for name, p in mixture.named_parameters() if all(part in name for part in parts)]


def measured(mixture: molora.Mixture, *, total: float | None = None):
    norms = GradientNorms(mixture)
    norms.measure(step=3, device=DEVICE)
    assert norms.step == 3
    assert not norms.shared
    return norms.norms(norms.squares.tolist(), total=total)


def test_norms_by_role_and_by_site(mixture: molora.Mixture) -> None:
    found = measured(mixture)
    roles = mixture.trainable_parameters()
    assert found.roles.keys() == roles.keys() == {"experts", "router", "other"}
    for role, parameters in roles.items():
        assert found.roles[role] == pytest.approx(norm(parameters), rel=1e-6)
    assert found.sites.keys() == mixture.built.sites.keys()
    for layer in ("model.layers.0", "model.layers.1"):
        ffn, query = found.sites[f"{layer}.mlp"], found.sites[f"{layer}.self_attn.q_proj"]
        assert ffn["experts"] == pytest.approx(norm(of(mixture, f"{layer}.mlp.", ".experts.")))
        assert ffn["router"] == pytest.approx(norm(of(mixture, f"{layer}.mlp.router")))
        assert query["experts"] == pytest.approx(norm(of(mixture, f"{layer}.", "q_proj.experts")))
        assert len({ffn["experts"], ffn["router"], query["experts"], query["router"]}) == 4
    # o_proj has no site, but counts as an expert
    assert found.roles["experts"] > math.hypot(*(s["experts"] for s in found.sites.values()))


def test_clipping_afterwards_changes_nothing(mixture: molora.Mixture) -> None:
    before = measured(mixture)
    parameters = [p for role in mixture.trainable_parameters().values() for p in role]
    total = float(nn.utils.clip_grad_norm_(parameters, 0.01))
    assert measured(mixture).roles["experts"] < 0.011
    after = measured(mixture, total=total)
    assert after.roles == pytest.approx(before.roles, rel=1e-5)
    for site, norms in before.sites.items():
        assert after.sites[site] == pytest.approx(norms, rel=1e-5)
    assert math.hypot(*after.roles.values()) == pytest.approx(total)


def test_a_frozen_role_has_norm_zero(mixture: molora.Mixture) -> None:
    mixture.freeze("router")
    mixture.model.zero_grad()
    mixture.model(**batch_for(mixture.model)).loss.backward()
    found = measured(mixture)
    assert found.roles["router"] == 0
    assert found.roles["experts"] > 0.1
    assert found.sites["model.layers.0.mlp"]["router"] == 0


def test_no_gradient_at_all_is_zero() -> None:
    mixture = molora.attach(tiny("llama"), CONFIG)
    found = measured(mixture, total=0.0)
    assert set(found.roles.values()) == {0.0}


def test_what_is_not_finite_stays_so(mixture: molora.Mixture) -> None:
    of(mixture, "layers.0.mlp.router")[0].grad[0, 0] = math.inf
    found = measured(mixture, total=math.inf)
    assert not math.isfinite(found.roles["router"])
    assert not math.isfinite(found.sites["model.layers.0.mlp"]["router"])


def test_gradients_of_half_precision_are_squared_in_full() -> None:
    config = CONFIG.model_copy(update={"dtype": "float16"})
    mixture = molora.attach(tiny("llama"), config)
    for parameter in of(mixture, ".experts."):
        parameter.grad = torch.full_like(parameter, 300.0)  # 300² is beyond float16
    number = sum(p.numel() for p in of(mixture, ".experts."))
    assert measured(mixture).roles["experts"] == pytest.approx(300 * math.sqrt(number), rel=1e-4)

"""Every expert starts differently, and always the same: whatever else is built, and in any order
(B-35)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.experts import init
from molora.presets import mixture_config


class Block(nn.Module):
    """Two linears of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(20, 12)
        self.o_proj = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o_proj(self.q_proj(x).tanh())


class Model(nn.Module):
    """A stack of blocks."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(num_layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def state(
    num_layers: int = 2, *, targets: tuple[str, ...] = ("q_proj", "o_proj"), seed: int = 0
) -> dict[str, Tensor]:
    config = mixture_config(
        {"preset": "mola", "num_experts": 4, "rank": 3, "targets": list(targets), "losses": []}
    )
    return molora.attach(Model(num_layers), config, seed=seed).state_dict()


def test_a_start_depends_on_the_seed_and_the_path_alone():
    torch.manual_seed(1)
    alone = state(1, targets=("q_proj",))
    torch.manual_seed(2)
    torch.rand(3)
    among_others = state(3, targets=("o_proj", "q_proj"))
    assert len(alone) == 3
    for name, tensor in alone.items():
        assert torch.equal(tensor, among_others[name]), name

    other_seed = state(1, targets=("q_proj",), seed=1)
    name = "layers.0.q_proj.experts.lora_A"
    assert not torch.equal(alone[name], other_seed[name])


def test_attaching_leaves_the_global_random_state_alone():
    model = Model(1)
    config = mixture_config({"preset": "molora", "targets": "q_proj"})
    before = torch.get_rng_state()
    molora.attach(model, config)
    assert torch.equal(torch.get_rng_state(), before)


def test_experts_sites_and_routers_all_start_differently():
    tensors = state()
    rows = [
        expert.flatten()[:12]
        for name, tensor in tensors.items()
        if not name.endswith("lora_B")
        for expert in tensor
    ]
    assert len(rows) == 4 * 4 + 4 * 4  # four linears with four experts, and four routers' rows
    distinct = {tuple(row.tolist()) for row in rows}
    assert len(distinct) == len(rows)


def test_down_projections_and_routers_fill_the_kaiming_bound_and_up_projections_are_zero():
    for name, tensor in state().items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(tensor.shape[-1])  # in_features of the linear
            assert 0.9 * bound < tensor.abs().max() <= bound, name
        assert tensor.dtype == torch.float32


def test_fan_in_is_that_of_one_expert_not_of_the_stack():
    shape, bound = (8, 16, 256), 1 / 16
    ours = init.kaiming(shape, init.generator(0, "a"))
    assert 0.999 * bound < ours.abs().max() <= bound
    assert ours.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    # what torch does with a stack: Octavius' experts started four times too small
    stacked = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
    assert stacked.abs().max().item() == pytest.approx(bound / math.sqrt(16), rel=0.01)
    one = nn.init.kaiming_uniform_(torch.empty(shape[1:]), a=math.sqrt(5))
    assert one.abs().max().item() == pytest.approx(ours[0].abs().max().item(), rel=0.01)


def test_normal_has_the_mean_0_and_the_given_deviation():
    values = init.normal((4, 100, 100), 0.02, init.generator(0, "router"))
    assert values.std().item() == pytest.approx(0.02, rel=0.02)
    assert values.mean().item() == pytest.approx(0, abs=5e-4)


def test_gaussian_experts_have_the_deviation_1_over_rank():
    config = {"groups": [{"targets": "q_proj", "num_experts": 8, "rank": 5}]}
    config["groups"][0]["expert"] = {"kind": "lora", "init": "gaussian"}
    config["groups"][0]["router"] = {"init": {"kind": "normal", "std": 0.3}}
    tensors = molora.attach(Model(1), mixture_config(config)).state_dict()
    assert tensors["layers.0.q_proj.experts.lora_A"].std().item() == pytest.approx(0.2, rel=0.1)
    assert tensors["layers.0.q_proj.router.weight"].std().item() == pytest.approx(0.3, rel=0.2)


def test_a_generator_depends_on_both_its_arguments():
    def first(seed: int, name: str) -> float:
        return torch.rand(1, generator=init.generator(seed, name)).item()

    draws = [first(0, "a"), first(1, "a"), first(0, "b"), first(10, "a"), first(1, "0/a")]
    assert len(set(draws)) == len(draws)
    assert first(0, "a") == draws[0]

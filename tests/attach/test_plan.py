"""Targets and allocations resolved against a model before anything is changed."""

from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import nn

import molora
from molora.attach import Plan, make_plan
from molora.config import MixtureConfig


def plan(model: nn.Module, *groups: dict[str, Any]) -> Plan:
    return make_plan(model, MixtureConfig.parse({"groups": groups}))


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    with torch.device("meta"):
        return tiny("llama", num_hidden_layers=5)


def test_lists_and_shapes_give_each_layer_its_count(llama: nn.Module) -> None:
    found = plan(
        llama,
        {
            "targets": ["q_proj", "v_proj", "re:.*q_proj"],
            "num_experts": "inverted_triangle",
            "rank": [3, 5, 7, 9, 11],
            "select": {"kind": "top_k", "k": 4},
        },
    )
    # layer l of 5 is in quarter ⌊4l/5⌋; top_k is clamped to a named shape's experts
    assert [(p.num_experts, p.rank, p.top_k) for p in found.placements if "q_proj" in p.path] == [
        (2, 3, 2),
        (2, 5, 2),
        (4, 7, 4),
        (6, 9, 4),
        (8, 11, 4),
    ]
    assert [(m.pattern, len(m.paths)) for m in found.matches] == [
        ("q_proj", 5),
        ("v_proj", 5),
        ("re:.*q_proj", 5),
    ]
    assert len(found.placements) == 10
    assert {(p.in_features, p.out_features) for p in found.placements} == {(32, 48), (32, 24)}


def test_encoder_and_decoder_of_different_depth_have_their_own_layers() -> None:
    with torch.device("meta"):
        model = tiny("t5", num_layers=4, num_decoder_layers=2)
    found = plan(model, {"targets": "SelfAttention.q", "num_experts": "inverted_triangle"})
    counts = {p.path.partition(".layer")[0]: p.num_experts for p in found.placements}
    encoder = {f"encoder.block.{i}": n for i, n in enumerate((2, 4, 6, 8))}
    assert counts == encoder | {"decoder.block.0": 2, "decoder.block.1": 6}


@pytest.mark.parametrize("what", ["num_experts", "rank", "top_k"])
def test_a_list_of_another_length_than_the_layers_is_an_error(llama: nn.Module, what: str) -> None:
    group: dict[str, Any] = {"targets": "q_proj"}
    if what == "top_k":
        group["select"] = {"kind": "top_k", "k": [2, 2]}
    else:
        group[what] = [4, 4]
    with pytest.raises(
        molora.ConfigError, match=f"{what} has 2 entries and the model has 5 layers.*one int"
    ):
        plan(llama, group)


def test_more_chosen_experts_than_a_layer_has_is_an_error(llama: nn.Module) -> None:
    # the lists are compared layer by layer
    group = {
        "targets": "q_proj",
        "num_experts": [3, 3, 3, 3, 2],
        "select": {"kind": "top_k", "k": [2, 2, 2, 3, 2]},
    }
    assert plan(llama, group).placements[3].top_k == 3
    with pytest.raises(molora.ConfigError, match="top_k=3 exceeds num_experts=2 of some layer"):
        plan(llama, group | {"select": {"kind": "top_k", "k": [2, 2, 2, 2, 3]}})


def test_a_linear_matched_by_two_groups_is_an_error_that_names_both(llama: nn.Module) -> None:
    with pytest.raises(
        molora.AttachError,
        match=r"layers\.0\.self_attn\.q_proj is matched by two groups.*\['attention'\].*\['q_proj'",
    ):
        plan(llama, {"targets": "attention"}, {"targets": ["q_proj", "up_proj"]})


def test_a_count_per_layer_needs_a_linear_in_a_layer(llama: nn.Module) -> None:
    with pytest.raises(
        molora.ConfigError, match="rank varies over layers, but lm_head belongs to no layer"
    ):
        plan(llama, {"targets": "lm_head", "rank": [1, 2, 3, 4, 5]})
    assert plan(llama, {"targets": "lm_head"}).placements[0].layer is None


def test_shared_decisions_need_equal_numbers_of_experts() -> None:
    site = {"kind": "linear", "scope": "block"}
    config = MixtureConfig.parse(
        {
            "groups": [
                {"targets": "q_proj", "num_experts": 4, "site": site},
                {"targets": "v_proj", "num_experts": 3, "site": site},
            ]
        }
    )
    with pytest.raises(molora.AttachError, match=r"v_proj has 3 experts.* has 4.*equal num_exp"):
        molora.attach(tiny("llama"), config)


def test_layer_scope_needs_a_layer() -> None:
    config = MixtureConfig.parse(
        {"groups": [{"targets": "lm_head", "site": {"kind": "linear", "scope": "layer"}}]}
    )
    with pytest.raises(molora.AttachError, match="lm_head belongs to no layer"):
        molora.attach(tiny("llama"), config)


def test_attaching_on_the_meta_device_counts_without_memory(llama: nn.Module) -> None:
    with torch.device("meta"):
        model = tiny("llama", vocab_size=100_000_000, num_hidden_layers=4)
    mixture = molora.attach(model, molora.presets.mola(rank=5, targets=["q_proj", "down_proj"]))
    experts = 2 + 4 + 6 + 8
    assert mixture.num_parameters() == {
        "experts": experts * 5 * (32 + 48 + 40 + 32),
        "router": experts * (32 + 40),
    }
    assert {p.device.type for p in model.parameters()} == {"meta"}
    mixture.detach()

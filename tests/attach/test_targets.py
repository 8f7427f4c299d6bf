"""Patterns → linears, and every way in which a configuration does not fit a model (B-25)."""

import re

import pytest
import torch
import transformers
from tiny_models import tiny
from torch import nn

import molora
from molora.attach.targets import match_targets


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    with torch.device("meta"):
        return tiny("llama", num_hidden_layers=3)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param("q_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj", "2.self_attn.q_proj"]),
        pytest.param("mlp.up_proj", ["0.mlp.up_proj", "1.mlp.up_proj", "2.mlp.up_proj"]),
        pytest.param("1.self_attn.v_proj", ["1.self_attn.v_proj"]),
        pytest.param("model.layers.2.mlp.down_proj", ["2.mlp.down_proj"]),
        pytest.param(
            r"re:.*layers\.[02]\.self_attn\.[kv]_proj",
            [
                *("0.self_attn.k_proj", "0.self_attn.v_proj"),
                *("2.self_attn.k_proj", "2.self_attn.v_proj"),
            ],
        ),
    ],
)
def test_a_pattern_matches_whole_components_in_model_order(
    llama: nn.Module, pattern: str, expected: list[str]
) -> None:
    (match,) = match_targets(llama, (pattern,))
    assert list(match.paths) == [f"model.layers.{path}" for path in expected]


def test_routers_of_a_moe_base_are_matched_by_name_only() -> None:
    config = transformers.Qwen2MoeConfig(
        num_hidden_layers=1, hidden_size=32, shared_expert_intermediate_size=40, vocab_size=64
    )
    with torch.device("meta"):
        model = transformers.Qwen2MoeForCausalLM(config)
    (match,) = match_targets(model, ("ffn",))
    shared = "model.layers.0.mlp.shared_expert"
    assert set(match.paths) == {f"{shared}.{n}_proj" for n in ("gate", "up", "down")}
    assert match_targets(model, ("shared_expert_gate",))[0].paths == (f"{shared}_gate",)


def test_a_head_is_matched_by_name_only(llama: nn.Module) -> None:
    assert match_targets(llama, ("lm_head",))[0].paths == ("lm_head",)
    assert "lm_head" not in match_targets(llama, ("all",))[0].paths


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param(
            "q_porj", "targets='q_porj' matches no linear module. Close names: q_proj", id="typo"
        ),
        # a suffix begins at a component
        pytest.param("proj", "targets='proj' matches no linear", id="part_of_a_component"),
        pytest.param("mlp.q_proj", "targets='mlp.q_proj' matches no linear", id="wrong_parent"),
        pytest.param("xyz", "Linear modules: down_proj, gate_proj, k_proj, lm_head", id="far"),
        pytest.param("re:q_proj", "targets='re:q_proj' matches no linear", id="regex_is_full"),
        pytest.param("re:(", "targets='re:(' is not a regular expression", id="bad_regex"),
        pytest.param(
            "embed_tokens", "model.embed_tokens (Embedding) has that name", id="not_a_linear"
        ),
    ],
)
def test_a_pattern_without_a_match_is_an_error_that_helps(
    llama: nn.Module, pattern: str, message: str
) -> None:
    with pytest.raises(molora.AttachError, match=re.escape(message)):
        match_targets(llama, ("k_proj", pattern))

"""What would let packed sequences see each other is refused: arguments, and bases, by what they are
and by what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packed_batches import WIDTH, packed
from tiny_models import DECODER, tiny
from torch import nn

import molora
from molora.attach import packing
from molora.config import MixtureConfig

LINEAR = MixtureConfig.parse({"groups": [{"num_experts": 3, "rank": 5}]})


def test_what_would_join_the_sequences_is_refused() -> None:
    model = tiny("llama")
    molora.attach(model, LINEAR)
    batch = packed()
    for name, value in {
        "attention_mask": torch.ones_like(batch["input_ids"]),
        "use_cache": True,
        "past_key_values": transformers.DynamicCache(config=model.config),
    }.items():
        with pytest.raises(molora.AttachError, match=rf"segment_ids came with {name}.*Leave it"):
            model(**{**batch, name: value})
    with pytest.raises(molora.AttachError, match=r"shape \(3, 17\), but the batch is \(3, 18\)"):
        model(**{**batch, "segment_ids": batch["segment_ids"][:, 1:]})


def test_task_types_are_one_per_sequence() -> None:
    model = tiny("llama").train()
    molora.attach(model, molora.presets.loramoe(num_experts=4))
    for types in (torch.tensor([0, 1, 1]), torch.zeros(7, dtype=torch.int64)):
        with pytest.raises(molora.ConfigError, match=r"one value per sequence, \(6,\)"):
            model(**{**packed(), "task_types": types})


def other(name: str, **settings: Any) -> nn.Module:
    """A tiny model of a family that is not in `tiny_models`."""
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**small, **settings)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return model


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
REFUSED = {
    "t5": (lambda: tiny("t5"), "T5ForConditionalGeneration is no causal language model"),
    "bert": (lambda: tiny("bert"), "BertForSequenceClassification is no causal"),
    "flex": (
        lambda: tiny("llama", attn_implementation="flex_attention"),
        "untested with attention 'flex_attention'; use sdpa or eager",
    ),
    "lfm2": (
        lambda: other("Lfm2", **HEADS, layer_types=["conv", "full_attention"]),
        "layers of kind 'conv' carry a state from one sequence into the next",
    ),
    "bloom": (lambda: other("Bloom", n_head=4), "BloomForCausalLM takes no position_ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bases_that_cannot_separate_sequences_are_refused(case: str) -> None:
    make, reason = REFUSED[case]
    model = make()
    assert reason in packing.refusal(model)
    molora.attach(model, LINEAR)
    with pytest.raises(molora.AttachError, match=r"packed into one row cannot be kept apart"):
        model(**packed())


class WithoutPositions(transformers.LlamaForCausalLM):
    """A base whose masks do not follow positions, which no rule can see."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


def leaky(attention: str) -> nn.Module:
    torch.manual_seed(0)
    return WithoutPositions(transformers.LlamaConfig(**DECODER, attn_implementation=attention))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [leaky, lambda attention: other("OPT", num_attention_heads=4)])
def test_a_base_that_does_not_use_positions_is_found_out(make: Any, attention: str) -> None:
    model = make(attention)
    group = {"num_experts": 3, "rank": 5, "targets": "attention"}
    molora.attach(model, MixtureConfig.parse({"groups": [group]}))
    assert packing.refusal(model) == ""
    for _ in range(2):
        with pytest.raises(molora.AttachError, match=r"measured on this model.* sees 1\d\d % of"):
            model(**packed())


def test_a_leak_that_could_not_be_measured_is_measured_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = leaky("sdpa")
    molora.attach(model, LINEAR)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "vocab_size", 1000)  # more than there are
        with pytest.raises(IndexError, match="out of range"):
            model(**packed())
    with pytest.raises(molora.AttachError, match="measured on this model"):
        model(**packed())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_a_leak_is_measured_once_and_leaves_everything_as_it_was(family: str) -> None:
    model = tiny(family).train()
    mixture = molora.attach(model, LINEAR)
    next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    state = torch.random.get_rng_state()
    with mixture.record() as records:
        model(**packed())
        assert len(forwards) == 1 + 4
        model(**packed())
    assert len(forwards) == 2 + 4
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    for found in records.values():
        assert len(found) == 2
        assert all(record.grid == (3, WIDTH) for record in found)
    assert packing.leak(model) < 1e-5

"""X-LoRA against package peft, and its decoding with a cache for each pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import save_adapter
from tiny_models import tiny
from transformers import DynamicCache, StaticCache
from xlora_models import (
    IDS,
    MASK,
    SETTINGS,
    composed,
    logits,
    peft_model,
    set_classifier,
    write_directories,
)

import molora
from molora.attach.caches import PairedCache
from molora.errors import AttachError


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_directories(tmp_path_factory.mktemp("xlora"))


@pytest.mark.parametrize(("ours", "theirs"), SETTINGS.values(), ids=list(SETTINGS))
def test_logits_are_those_of_package_peft(
    ours: dict[str, Any], theirs: dict[str, Any], directories: dict[str, Path]
) -> None:
    model, mixture = composed(directories, **ours)
    other = peft_model(directories, **theirs)
    set_classifier(mixture, other)
    expected, found = logits(other), logits(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    set_classifier(mixture, seed=4)
    assert (logits(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"first_pass_score": 0.3}])
def test_decoding_with_caches_gives_the_logits_of_the_whole(
    options: dict[str, Any], directories: dict[str, Path]
) -> None:
    model, mixture = composed(directories, **options)
    set_classifier(mixture)
    with torch.no_grad():
        whole = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
        parts, cache = [], None
        for start, end in ((0, 4), (4, 5), (5, 9)):
            output = model(
                input_ids=IDS[:, start:end],
                attention_mask=MASK[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            parts.append(output.logits)
            cache = output.past_key_values
    assert isinstance(cache, PairedCache)
    assert cache.get_seq_length() == cache.first_pass.get_seq_length() == 9
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found[MASK.bool()], whole[MASK.bool()], atol=1e-5, rtol=1e-5)


def test_the_first_pass_of_a_new_token_reads_one_position(directories: dict[str, Path]) -> None:
    model, _ = composed(directories)
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_hook(
        lambda m, args, out: lengths.append(out.shape[1])
    )
    model.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
    assert lengths == [9, 9, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_writes_what_it_writes_without(
    beams: int, directories: dict[str, Path]
) -> None:
    model, mixture = composed(directories, layerwise=True)
    set_classifier(mixture)
    options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    cached = model.generate(IDS, attention_mask=MASK, **options)
    plain = model.generate(IDS, attention_mask=MASK, use_cache=False, **options)
    assert torch.equal(cached, plain)
    with mixture.disabled():
        assert not torch.equal(model.generate(IDS, attention_mask=MASK, **options), plain)


def test_a_copied_cache_goes_its_own_way(directories: dict[str, Path]) -> None:
    model, mixture = composed(directories)
    set_classifier(mixture)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
        copied = copy.deepcopy(cache)
        first = model(input_ids=IDS[:, :1], past_key_values=cache).logits
        again = model(input_ids=IDS[:, :1], past_key_values=copied).logits
    assert torch.equal(first, again)
    assert copied.first_pass is not cache.first_pass
    cache.crop(-5)
    assert cache.first_pass.get_seq_length() == 5
    assert copied.first_pass.get_seq_length() == 10


def test_caches_that_cannot_hold_the_first_pass_are_refused(directories: dict[str, Path]) -> None:
    model, mixture = composed(directories)
    with mixture.disabled(), torch.no_grad():
        filled = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(AttachError, match="9 positions that this mixture has not seen"):
        model(input_ids=IDS[:, :1], past_key_values=filled)
    with pytest.raises(AttachError, match="a StaticCache cannot hold"):
        model(input_ids=IDS, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    with torch.no_grad():
        half = model(input_ids=IDS, use_cache=True).past_key_values
        with mixture.disabled():
            model(input_ids=IDS[:, :1], past_key_values=half)
    with pytest.raises(AttachError, match="10 positions, but the first pass has seen 9"):
        model(input_ids=IDS[:, :1], past_key_values=half)


@pytest.mark.parametrize("layerwise", [False, True])
def test_only_the_classifier_is_trained(layerwise: bool, directories: dict[str, Path]) -> None:
    model, mixture = composed(directories, layerwise=layerwise)
    model.train()
    loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "router.layers.0.weight",
        "router.layers.0.bias",
    }
    assert all(p.grad.abs().max() > 0 for p in mixture.trainable_parameters()["router"])
    rows = 3 * len(mixture.plan.placements) if layerwise else 3
    assert mixture.num_parameters() == {
        "experts": 0,
        "router": rows * (model.config.hidden_size + 1),
    }


def test_records_have_one_site_or_one_per_linear(directories: dict[str, Path]) -> None:
    model, mixture = composed(directories)
    with mixture.record() as records, torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
    assert records.keys() == {"model"}
    assert records["model"].scores.shape == (18, 3)
    assert records["model"].mask.sum() == MASK.sum()
    model, mixture = composed(directories, layerwise=True)
    with mixture.record() as records, torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
    assert records.keys() == {placement.path for placement in mixture.plan.placements}


@pytest.mark.parametrize("layerwise", [False, True])
def test_save_and_load_keep_the_logits(
    layerwise: bool, directories: dict[str, Path], tmp_path: Path
) -> None:
    model, mixture = composed(directories, layerwise=layerwise, depth=2)
    set_classifier(mixture)
    expected = logits(model)
    mixture.save(tmp_path / "saved")
    other = tiny("llama").eval()
    molora.load(other, tmp_path / "saved")
    assert torch.equal(logits(other), expected)


def test_detaching_gives_the_base_back(directories: dict[str, Path]) -> None:
    expected = logits(tiny("llama").eval())
    model, mixture = composed(directories, layerwise=True)
    assert not torch.equal(logits(model), expected)
    with mixture.disabled():
        assert torch.equal(logits(model), expected)
    mixture.detach()
    assert torch.equal(logits(model), expected)
    assert not hasattr(model, "router")


def test_recomputed_layers_read_the_decision_of_their_forward(directories: dict[str, Path]) -> None:
    gradients = []
    for checkpointed in (False, True):
        model, mixture = composed(directories)
        set_classifier(mixture)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": molora.checkpoint_context}
            )
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        gradients.append([p.grad for p in mixture.trainable_parameters()["router"]])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-7, rtol=1e-5)


def test_encoder_decoders_and_second_groups_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "t5", "t5", target_modules=["q"])
    model = tiny("t5")
    with pytest.raises(AttachError, match="X-LoRA reads the final hidden state"):
        molora.compose(model, molora.load_experts({"a": tmp_path / "t5"}), router="xlora")
    assert not any("lora" in name for name, _ in model.named_parameters())

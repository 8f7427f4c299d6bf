"""Putting a mixture on a model and taking it off: what is refused, what is left, how experts
start."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import molora
from molora.config import MixtureConfig

MOLA = molora.presets.mola(num_experts=3, rank=5, dropout=0.0)
MIXLORA = molora.presets.mixlora(num_experts=3, rank=5, dropout=0.0)
BOTH = [pytest.param(MOLA, id="linear"), pytest.param(MIXLORA, id="ffn")]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(**batch_for(model)).logits
    return result


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could leave on a model."""
    return {
        "modules": [name for name, _ in model.named_modules()],
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        },
        "gradients": {n: (p.requires_grad, p._backward_hooks) for n, p in model.named_parameters()},
    }


@pytest.mark.parametrize("config", BOTH)
def test_attaching_twice_is_refused_and_the_first_mixture_goes_on(config: MixtureConfig) -> None:
    model = tiny("llama")
    randomize(molora.attach(model, config))
    before = logits(model)
    with pytest.raises(molora.AttachError, match=r"has a mixture already. Call detach\(\)"):
        molora.attach(model, MOLA)
    assert torch.equal(logits(model), before)


def test_a_peft_model_or_a_model_that_carries_its_layers_is_refused() -> None:
    model = tiny("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(molora.AttachError, match=r"is a PEFT model.*merge_and_unload"):
        molora.attach(wrapped, MOLA)
    with pytest.raises(molora.AttachError, match=r"carries PEFT adapters\. Unload them"):
        molora.attach(model, MOLA)
    molora.attach(wrapped.unload(), MOLA)


def test_an_attribute_in_the_way_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.v_proj.router = "mine"
    with pytest.raises(molora.AttachError, match="already has an attribute 'router'"):
        molora.attach(model, MOLA)


# each fails at another moment: before anything, while experts are put on, at the extra modules
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        pytest.param({"groups": [{"targets": "q_porj"}]}, "Close names", id="targets"),
        pytest.param(
            {
                "groups": [
                    {"targets": ["gate_proj", "down_proj"], "site": {"kind": "ffn"}},
                    {"targets": "q_proj", "site": {"kind": "linear", "scope": "layer"}},
                    {"targets": "o_proj", "num_experts": 1},
                    {
                        "targets": "v_proj",
                        "num_experts": 3,
                        "site": {"kind": "linear", "scope": "layer"},
                    },
                ]
            },
            "v_proj has 3 experts",
            id="building",
        ),
        pytest.param(
            {"groups": [{}], "train_tokens": {"ids": [3]}, "train_modules": ["lm_haed"]},
            "train_modules='lm_haed' is no module.*Close names: lm_head",
            id="train_modules",
        ),
        pytest.param(
            {"groups": [{}], "train_modules": ["model.layers.0.mlp.act_fn"]},
            "has no parameters to train",
            id="nothing_to_train",
        ),
        pytest.param(
            {"groups": [{}], "train_modules": ["lm_head"], "train_tokens": {"ids": [3, 96]}},
            r"has id 96, but model\.embed_tokens\.weight has 96 rows.*resize",
            id="train_tokens",
        ),
    ],
)
def test_a_failed_attach_leaves_the_model_as_it_was(settings: dict[str, Any], match: str) -> None:
    model = tiny("llama")
    model.model.norm.requires_grad_(False)
    before, start = traces(model), logits(model)
    with pytest.raises(molora.AttachError, match=match):
        molora.attach(model, MixtureConfig.parse(settings))
    assert traces(model) == before
    assert torch.equal(logits(model), start)


@pytest.mark.parametrize("config", BOTH)
def test_detach_leaves_a_forward_that_was_replaced_before(config: MixtureConfig) -> None:
    model = tiny("llama")
    linear, ffn = model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp
    calls = []
    for module in (linear, ffn):
        original = module.forward
        module.forward = lambda x, f=original: (calls.append(1), f(x))[1]
    before = traces(model)
    own = linear.forward, ffn.forward
    mixture = molora.attach(model, config)
    if config is MOLA:
        logits(model)
        assert len(calls) == 2  # what was there before still runs below the experts
    mixture.detach()
    assert traces(model) == before
    assert (linear.forward, ffn.forward) == own
    with pytest.raises(molora.AttachError, match=r"detached already\. Attach a new one"):
        mixture.detach()


def test_the_same_seed_gives_the_same_experts_whatever_the_order_of_groups_and_global_state() -> (
    None
):
    def started(seed: int, *targets: str) -> dict[str, Tensor]:
        groups = [{"targets": t, "num_experts": 3, "rank": 5} for t in targets]
        config = MixtureConfig.parse({"groups": groups})
        return molora.attach(tiny("llama"), config, seed=seed).state_dict()

    one = started(7, "q_proj", "down_proj")
    torch.manual_seed(12345)
    other = started(7, "down_proj", "q_proj")
    alone = started(7, "down_proj")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(one[name], alone[name]) for name in alone)

    different = started(8, "q_proj", "down_proj")
    starts = [t for name, t in one.items() if not name.endswith("lora_B")]
    assert not any(
        torch.equal(one[name], different[name]) for name in one if not name.endswith("lora_B")
    )
    # neither two experts of a bank nor two banks start alike
    beginnings = [tuple(row.flatten()[:8].tolist()) for start in starts for row in start]
    assert len(set(beginnings)) == len(beginnings) == 3 * len(starts)


@pytest.mark.parametrize("config", BOTH)
def test_a_new_mixture_does_not_change_the_model_nor_does_it_saved_and_loaded(
    config: MixtureConfig, tmp_path: Path
) -> None:
    model = tiny("llama")
    base = logits(model)
    mixture = molora.attach(model, config)
    at_start = logits(model)
    # mixing whole FFNs adds up gates that sum to 1 only up to rounding
    assert torch.equal(at_start, base) if config is MOLA else (at_start - base).abs().max() < 1e-5
    mixture.save(tmp_path / "mixture")
    loaded = tiny("llama")
    molora.load(loaded, tmp_path / "mixture")
    assert torch.equal(logits(loaded), at_start)
    randomize(mixture)
    assert (logits(model) - base).abs().max() > 1e-2


@pytest.mark.parametrize("part", ["dropout", "noise"])
def test_new_modules_are_in_the_mode_of_the_model(part: str) -> None:
    random = {
        "dropout": {"expert": {"kind": "lora", "dropout": {"p": 0.5}}},
        "noise": {"router": {"noise_std": 1.0}},
    }[part]
    config = MixtureConfig.parse({"groups": [{"num_experts": 3, "rank": 5, **random}]})
    for training in (False, True):
        model = tiny("llama").train(training)
        randomize(molora.attach(model, config))
        assert torch.equal(logits(model), logits(model)) is not training


@pytest.mark.parametrize("config", BOTH)
def test_disabled_is_the_base_to_the_bit_nests_and_survives_exceptions(
    config: MixtureConfig,
) -> None:
    model = tiny("gpt2")
    base = logits(model)
    mixture = molora.attach(model, config)
    randomize(mixture)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-2
    with mixture.disabled():
        assert torch.equal(logits(model), base)
        with mixture.disabled():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(ValueError, match="have to specify"), mixture.disabled():
        model()
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("config", BOTH)
def test_a_deep_copy_is_independent(config: MixtureConfig) -> None:
    model = tiny("gpt2")
    base = logits(model)
    mixture = molora.attach(model, config)
    randomize(mixture)
    adapted = logits(model)
    twin, twin_mixture = copy.deepcopy((model, mixture))
    assert torch.equal(logits(twin), adapted)

    randomize(twin_mixture, seed=1)
    changed = logits(twin)
    assert (changed - adapted).abs().max() > 1e-2
    with twin_mixture.disabled():
        assert torch.equal(logits(twin), base)
        assert torch.equal(logits(model), adapted)
    with mixture.record() as records, twin_mixture.record() as twin_records:
        logits(twin)
    assert not records
    assert twin_records
    twin_mixture.detach()
    assert torch.equal(logits(twin), base)
    assert traces(twin) == traces(tiny("gpt2"))
    assert torch.equal(logits(model), adapted)

    mixture.detach()
    assert torch.equal(logits(model), base)
    alone = copy.deepcopy(twin)
    randomize(molora.attach(alone, config))
    assert torch.equal(logits(alone), adapted)


def test_adapted_linears_keep_what_parents_and_tools_read() -> None:
    model = tiny("gpt2")
    linear, plain = model.transformer.h[0].attn.c_attn, tiny("gpt2")
    names = [name for name, _ in model.named_parameters()]
    mixture = molora.attach(model, MOLA)
    assert type(linear) is type(plain.transformer.h[0].attn.c_attn)
    assert (linear.in_features, linear.out_features) == (32, 96)
    assert torch.equal(linear.weight, plain.transformer.h[0].attn.c_attn.weight)
    assert linear.bias is not None
    assert [n for n, _ in model.named_parameters() if "experts" not in n and "router" not in n] == (
        names
    )
    assert mixture.state_dict().keys() == {
        n for n, _ in model.named_parameters() if "experts" in n or "router" in n
    }


def test_a_model_spread_by_a_device_map_works(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"}).eval()
    reference = tiny("llama")
    base = logits(reference)
    for m in (model, reference):
        randomize(molora.attach(m, MOLA))
    torch.testing.assert_close(logits(model), logits(reference))
    assert (logits(model) - base).abs().max() > 1e-2


def test_a_model_with_offloaded_weights_is_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=where, offload_folder=tmp_path / "offload"
    ).eval()
    torch.testing.assert_close(logits(model), logits(tiny("llama")))
    with pytest.raises(
        molora.AttachError,
        match=r"weights of model\.layers\.1\.\S+ were offloaded.*device_map without",
    ):
        molora.attach(model, MOLA)

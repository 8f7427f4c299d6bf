"""A mixture goes onto the base that it was trained on, in any float dtype, and onto no other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved_mixtures import Snapshot, edit_manifest, logits, save_tiny
from tiny_models import batch_for, randomize, tiny
from torch import nn

import molora


def _nudged() -> nn.Module:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    return model


def _shortened() -> nn.Module:
    model = tiny("llama")
    model.model.layers = model.model.layers[:1]
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other weights": (lambda: tiny("llama", seed=1), "whose .* has other values"),
    "one weight by 1 %": (_nudged, "whose model.layers.1.mlp.up_proj.weight has other values"),
    "other rope": (
        lambda: tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "another rope_parameters",
    ),
    "other epsilon": (lambda: tiny("llama", rms_norm_eps=1e-5), "another rms_norm_eps"),
    "wider": (lambda: tiny("llama", hidden_size=48), "another hidden_size"),
    "deeper": (lambda: tiny("llama", num_hidden_layers=3), "another num_hidden_layers"),
    "more tokens": (lambda: tiny("llama", vocab_size=128), "another vocab_size"),
    "tied": (lambda: tiny("llama", tie_word_embeddings=True), "another tie_word_embeddings"),
    "same shapes, other family": (lambda: tiny("mistral"), "another model_type"),
    "other family": (lambda: tiny("gpt2"), "another .*model_type"),
    "other task": (lambda: tiny("bert"), "another .*model_type"),
    "inner model": (lambda: tiny("llama").model, "a parameter 'lm_head.weight' .*lacks"),
    "missing layer": (_shortened, "a parameter 'model.layers.1.* lacks"),
    "no Hugging Face model": (lambda: nn.Sequential(nn.Linear(3, 4)), "a parameter .* lacks"),
}


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_another_base_is_refused_and_left_alone(
    make: Callable[[], nn.Module], message: str, pristine: Path
) -> None:
    model = make()
    weights = copy.deepcopy(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(molora.CheckpointError, match=message):
        molora.load(model, pristine)
    assert [name for name, _ in model.named_modules()] == modules
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("saved_on", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_base_in_another_dtype_is_accepted(
    saved_on: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    if {saved_on, dtype} == {torch.bfloat16, torch.float16}:
        published = torch.bfloat16  # neither holds float32's values: they agree on a common source
    else:
        published = torch.float32
    mixture = molora.attach(tiny("llama").to(published).to(saved_on), _config())
    randomize(mixture)
    mixture.save(tmp_path / "mixture")
    model = tiny("llama").to(published).to(dtype)
    loaded = molora.load(model, tmp_path / "mixture")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, mixture.state_dict()[name]), name


def _config() -> molora.MixtureConfig:
    return molora.presets.mola(num_experts=[3, 5], top_k=2, rank=4)


def test_settings_that_loading_and_training_change_do_not_matter(
    pristine: Path, base: nn.Module
) -> None:
    base.config.pad_token_id = 5
    base.config.use_cache = False
    base.config._attn_implementation = "eager"
    base.config._name_or_path = "/elsewhere/model"
    base.config.dtype = "bfloat16"
    base.config.id2label = {0: "no", 1: "yes"}
    base.config.transformers_version = "5.99"
    base.config.new_in_a_later_version = True
    molora.load(base, pristine)


def test_training_the_mixture_does_not_make_it_another_base(tmp_path: Path) -> None:
    config = molora.presets.mola(num_experts=[3, 5], top_k=2, rank=4, train_modules=("lm_head",))
    model = tiny("llama")
    mixture = molora.attach(model, config)
    randomize(mixture)
    model.train()
    optimizer = torch.optim.SGD(mixture.parameter_groups(0.1))
    head = model.lm_head.weight.detach().clone()
    for _ in range(2):
        model(**batch_for(model)).loss.backward()
        optimizer.step()
    assert not torch.equal(model.lm_head.weight, head)
    mixture.save(tmp_path / "mixture")
    fresh = tiny("llama")
    molora.load(fresh, tmp_path / "mixture")
    assert torch.equal(logits(fresh), logits(model.eval()))


def test_a_mixture_is_not_loaded_onto_another(pristine: Path, base: nn.Module) -> None:
    molora.load(base, pristine)
    expected = logits(base)
    with pytest.raises(molora.AttachError, match="has a mixture already"):
        molora.load(base, pristine)
    assert torch.equal(logits(base), expected)


def test_a_late_refusal_takes_the_mixture_off_again(
    saved: Path, base: nn.Module, before: Snapshot
) -> None:
    """The configuration alone says bfloat16, which shows only once the mixture is on the model."""
    molora.load(base, saved).detach()
    before.assert_same(base)
    edit_manifest(saved, lambda data: data["mixture"].update(dtype="bfloat16"))
    state = torch.get_rng_state()
    with pytest.raises(molora.CheckpointError, match="is float32, its configuration says bfloat16"):
        molora.load(base, saved)
    before.assert_same(base)
    assert torch.equal(torch.get_rng_state(), state)


def test_partitioned_parameters_are_not_saved_as_empty_tensors(tmp_path: Path) -> None:
    mixture = save_tiny(tmp_path / "old")
    path, bank = next(iter(mixture.built.banks.items()))
    name, parameter = next(iter(bank.named_parameters()))
    parameter.data = parameter.data.new_empty(0)
    with pytest.raises(molora.CheckpointError, match=f"{path}.experts.{name} is empty"):
        mixture.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()

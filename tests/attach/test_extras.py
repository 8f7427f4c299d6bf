"""Modules and token rows that are trained beside the experts: trained, saved, restored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, batch_for, randomize, tiny
from torch import Tensor, nn

import molora
from molora.config import MixtureConfig

NEW = (VOCAB, VOCAB + 1)


def config(**extras: Any) -> MixtureConfig:
    return molora.presets.mola(num_experts=3, rank=5, dropout=0.0, **extras)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model.eval()(**batch).logits
    return result


def train(model: nn.Module, mixture: molora.Mixture, *batches: dict[str, Tensor]) -> None:
    """Steps of AdamW with weight decay."""
    optimiser = torch.optim.AdamW(mixture.parameter_groups(1e-2, weight_decay=0.5))
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize(
    ("family", "module", "parameters"),
    [
        pytest.param("llama", "lm_head", ["lm_head.weight"], id="head"),
        pytest.param("qwen2", "lm_head", ["lm_head.weight"], id="tied_head"),
        pytest.param("gemma2", "model.norm", ["model.norm.weight"], id="norm"),
        pytest.param("bert", "classifier", ["classifier.weight", "classifier.bias"], id="bert"),
        pytest.param(
            "roberta",
            "classifier",
            [f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")],
            id="roberta",
        ),
    ],
)
def test_a_declared_module_is_trained_saved_loaded_and_restored(
    family: str, module: str, parameters: list[str], tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base, weights = logits(model, batch), _weights(model)
    mixture = molora.attach(model, config(train_modules=[module]))
    assert [n for n in mixture.state_dict() if "experts" not in n and "router" not in n] == (
        parameters
    )
    train(model, mixture, *[batch_for(model, seed=s) for s in range(3)])
    trained = logits(model, batch)
    with mixture.disabled():
        # the head stays as trained: it is no expert
        assert (logits(model, batch) - base).abs().max() > 1e-2
    mixture.save(tmp_path / "mixture")

    fresh = tiny(family)
    loaded = molora.load(fresh, tmp_path / "mixture")
    assert torch.equal(logits(fresh, batch), trained)
    loaded.detach()
    assert torch.equal(logits(fresh, batch), base)

    mixture.detach()
    assert torch.equal(logits(model, batch), base)
    assert all(torch.equal(w, weights[n]) for n, w in _weights(model).items())


def resized(family: str) -> nn.Module:
    model = tiny(family)
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(VOCAB + 8)
    return model.eval()


def batch_with_new_tokens(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    batch = batch_for(model, seed=seed)
    for name in ("input_ids", "labels"):
        batch[name][0, 2], batch[name][1, 1] = NEW
    return batch


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_only_the_declared_rows_of_the_embeddings_change(family: str, tmp_path: Path) -> None:
    """Tied in Gemma and GPT-2, two parameters in Llama; other rows stay to the bit, under decay."""
    model = resized(family)
    batch = batch_with_new_tokens(model)
    base = logits(model, batch)
    embeddings = {
        n: p for n, p in model.named_parameters() if p.shape[0] == VOCAB + 8 and p.dim() == 2
    }
    assert len(embeddings) == (2 if family == "llama" else 1)
    before = {name: p.detach().clone() for name, p in embeddings.items()}
    mixture = molora.attach(model, config(train_tokens={"ids": NEW}))
    train(model, mixture, *[batch_with_new_tokens(model, seed) for seed in range(3)])
    trained = logits(model, batch)
    old = [i for i in range(VOCAB + 8) if i not in NEW]
    for name, parameter in embeddings.items():
        assert torch.equal(parameter[old], before[name][old])
        assert (parameter[list(NEW)] - before[name][list(NEW)]).abs().min(dim=1).values.gt(0).all()
        assert mixture.state_dict()[f"{name}.rows"].shape == (2, 32)

    mixture.save(tmp_path / "mixture")
    fresh = resized(family)  # its new rows start elsewhere
    molora.load(fresh, tmp_path / "mixture")
    torch.testing.assert_close(logits(fresh, batch)[..., :VOCAB], trained[..., :VOCAB])
    with pytest.raises(molora.MoLoRAError, match=r"resize_token_embeddings|another vocab_size"):
        molora.load(tiny(family), tmp_path / "mixture")

    mixture.detach()
    assert torch.equal(logits(model, batch), base)
    assert all(not p._backward_hooks for p in model.parameters())


def test_without_the_gradient_of_rows_other_rows_would_change() -> None:
    """The negative control: both the mask on the gradient and the missing decay are needed."""
    for spoil in ("gradient", "decay"):
        model = resized("llama")
        embedding = model.get_input_embeddings().weight
        mixture = molora.attach(model, config(train_tokens={"ids": NEW}))
        before = embedding.detach().clone()
        groups = mixture.parameter_groups(1e-2, weight_decay=0.5)
        if spoil == "gradient":
            mixture.extras.hooks[0].remove()
        else:
            groups[-1]["weight_decay"] = 0.5
        optimiser = torch.optim.AdamW(groups)
        model.train()(**batch_with_new_tokens(model)).loss.backward()
        optimiser.step()
        assert not torch.equal(embedding[:VOCAB], before[:VOCAB])


def test_a_declared_layer_does_not_take_in_the_experts_on_it(tmp_path: Path) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    base = logits(model, batch)
    mixture = molora.attach(model, config(train_modules=["model.layers.1"], targets="all"))
    roles = mixture.trainable_parameters()
    assert not {id(p) for p in roles["other"]} & {id(p) for p in roles["experts"] + roles["router"]}
    assert len(roles["other"]) == 9  # seven linears and two norms
    train(model, mixture, batch)
    trained = logits(model, batch)
    mixture.save(tmp_path / "mixture")
    fresh = tiny("llama")
    molora.load(fresh, tmp_path / "mixture").state_dict()
    assert torch.equal(logits(fresh, batch), trained)
    mixture.detach()
    assert torch.equal(logits(model, batch), base)


def test_a_tied_parameter_declared_under_all_its_names_is_one_parameter(tmp_path: Path) -> None:
    model = tiny("qwen2")
    extras = {
        "train_modules": ["lm_head", "model.embed_tokens"],
        "train_tokens": {"ids": [5]},
    }
    mixture = molora.attach(model, config(**extras))
    (parameter,) = mixture.trainable_parameters()["other"]
    assert parameter is model.lm_head.weight is model.model.embed_tokens.weight
    assert mixture.num_parameters()["other"] == VOCAB * 32
    assert list(mixture.extras.state()) == ["lm_head.weight"]
    # declared whole, all of its rows learn, not the named one alone
    before = parameter.detach().clone()
    batch = batch_for(model)
    train(model, mixture, batch)
    assert not torch.equal(parameter[6:], before[6:])
    mixture.save(tmp_path / "mixture")
    fresh = tiny("qwen2")
    molora.load(fresh, tmp_path / "mixture")
    assert torch.equal(logits(fresh, batch), logits(model, batch))


def test_the_experts_of_a_loaded_mixture_go_on_training(tmp_path: Path) -> None:
    model = tiny("llama")
    mixture = molora.attach(model, config(train_modules=["lm_head"]))
    randomize(mixture)
    mixture.save(tmp_path / "mixture")
    fresh = tiny("llama")
    loaded = molora.load(fresh, tmp_path / "mixture")
    batch = batch_for(model)
    for m, handle in ((model, mixture), (fresh, loaded)):
        train(m, handle, batch)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}

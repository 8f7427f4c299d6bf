"""Every preset on a tiny Llama is what its formula says: outputs, auxiliary loss and gradients
(B-38)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from preset_references import METHODS, Adapted, Method, Weights
from tiny_models import batch_for, tiny
from torch import Tensor, nn

import molora
from molora.presets import PRESETS

LENGTHS = (7, 4, 5)
TASK_TYPES = torch.tensor([1, 0, 1])

# method → arguments with which the preset must be found to differ from the reference
WRONG: dict[str, dict[str, object]] = {
    "lora": {"alpha": 6.1},
    "molora": {"alpha": 5.9},
    "mola": {"renormalize": False},
    "loramoe": {"delta": 0.12},
    "mixlora": {"renormalize": False},
    "mixlora_top_p": {"top_p": 0.75},
    "mixlora_switch": {"capacity": 3},
}


@dataclass(frozen=True)
class Result:
    """What a training forward and backward gave, in float64."""

    logits: Tensor
    """Of the tokens that are no padding."""
    aux: Tensor
    loss: Tensor
    gradients: Mapping[str, Tensor]


def base_model() -> nn.Module:
    """Four layers, so that MoLA's shape has all its counts; float64, to compare formulas only."""
    return tiny("llama", num_hidden_layers=4).double().train()


def random_state(mixture: molora.Mixture) -> dict[str, Tensor]:
    """Experts that act and routers that decide; float32, as mixtures store them."""
    source = torch.Generator().manual_seed(11)
    std = {"lora_A": 0.3, "lora_B": 0.2, "weight": 0.5}
    return {
        key: std[key.rpartition(".")[2]] * torch.randn(tensor.shape, generator=source)
        for key, tensor in mixture.state_dict().items()
    }


def attached(method: Method, **changes: object) -> tuple[nn.Module, molora.Mixture]:
    model = base_model()
    config = PRESETS[method.preset](**{**method.arguments, **changes})
    mixture = molora.attach(model, config)
    mixture.load_state_dict(random_state(mixture))
    for site in mixture.built.sites.values():
        site.router.jitter = 0.0  # the switch variant's noise
    return model, mixture


def run_molora(model: nn.Module, batch: Mapping[str, Tensor]) -> Result:
    out = model(**batch, task_types=TASK_TYPES)
    out.loss.backward()
    gradients = {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    aux = torch.zeros(()) if out.aux_loss is None else out.aux_loss.detach()
    valid = batch["attention_mask"].bool()
    return Result(out.logits[valid].detach(), aux.double(), out.loss.detach(), gradients)


def run_reference(
    method: Method, state: Weights, batch: Mapping[str, Tensor]
) -> tuple[Result, Adapted]:
    """The same model with the forwards of its linears or FFNs replaced by the formulas."""
    model, valid = copy.deepcopy(base_model()).requires_grad_(False), batch["attention_mask"].bool()
    leaves = {key: tensor.double().requires_grad_() for key, tensor in state.items()}
    adapted = Adapted(method, leaves, valid)
    for path, module in model.named_modules():
        if path.endswith(".mlp"):
            base = {
                name: child.weight for name, child in module.named_children() if name != "act_fn"
            }
            module.forward = partial(lambda path, base, x: adapted.ffn(path, x, base), path, base)
        elif ".self_attn." in path:
            W = module.weight
            module.forward = partial(lambda path, W, x: adapted.linear(path, x, W), path, W)
    out = model(**batch)
    aux = adapted.aux(TASK_TYPES)
    loss = out.loss + aux
    loss.backward()
    gradients = {key: leaf.grad for key, leaf in leaves.items()}
    return Result(out.logits[valid].detach(), aux.detach(), loss.detach(), gradients), adapted


def differences(one: Result, other: Result) -> dict[str, float]:
    """The largest relative difference of each part."""
    parts = {"logits": (one.logits, other.logits), "aux": (one.aux, other.aux)}
    parts |= {"loss": (one.loss, other.loss)}
    parts |= {key: (one.gradients[key], other.gradients[key]) for key in other.gradients}
    return {
        name: ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
        for name, (a, b) in parts.items()
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", METHODS)
def test_preset_is_its_formula(name, side):
    method = METHODS[name]
    model, mixture = attached(method)
    batch = batch_for(model, LENGTHS, side=side)
    base = base_model()(**batch).logits[batch["attention_mask"].bool()]

    found = run_molora(model, batch)
    expected, adapted = run_reference(method, random_state(mixture), batch)

    assert found.gradients.keys() == expected.gradients.keys()
    # parameters, and so their gradients, are stored in float32
    wrong = {part: value for part, value in differences(found, expected).items() if value > 1e-6}
    assert wrong == {}
    # what was compared was worth comparing
    assert (found.logits - base).abs().max() > 0.01
    for key, gradient in expected.gradients.items():
        assert gradient.abs().max() > 1e-6, key
    for decision in adapted.decisions.values():
        chosen = decision.chosen[batch["attention_mask"].bool()]
        varied = decision.probabilities.std(dim=(0, 1)).max() > 0.01
        assert len(chosen.unique(dim=0)) > 1 or (chosen.all() and varied)


@pytest.mark.parametrize("name", METHODS)
def test_another_setting_is_another_method(name):
    method = METHODS[name]
    model, mixture = attached(method, **WRONG[name])
    batch = batch_for(model, LENGTHS)
    found = run_molora(model, batch)
    expected, _ = run_reference(method, random_state(mixture), batch)
    assert max(differences(found, expected).values()) > 1e-3


def test_capacity_acts_in_training_only_and_drops_tokens_here():
    method = METHODS["mixlora_switch"]
    model, mixture = attached(method)
    batch = batch_for(model, LENGTHS)
    dropped = {}
    for mode in (True, False):
        with mixture.record() as records:
            model.train(mode)(**batch, task_types=TASK_TYPES)
        dropped[mode] = sum(int((r.gates[r.mask] == 0).sum()) for r in records.values())
    assert dropped[True] > 0
    assert dropped[False] == 0


# ------------------------------------------------------------------ parameter counts

HIDDEN, INNER, LAYERS, RANK = 32, 40, 4, 3
QUERY, KEY = 48, 24
SIZES = {  # linear → (in, out) of tiny_models' Llama
    "q_proj": (HIDDEN, QUERY),
    "k_proj": (HIDDEN, KEY),
    "v_proj": (HIDDEN, KEY),
    "o_proj": (QUERY, HIDDEN),
    "gate_proj": (HIDDEN, INNER),
    "up_proj": (HIDDEN, INNER),
    "down_proj": (INNER, HIDDEN),
}
ATTENTION = [SIZES[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
FFN = [SIZES[name] for name in ("gate_proj", "up_proj", "down_proj")]


def factors(linears: list[tuple[int, int]], experts: int) -> int:
    """E · r · (in + out) per linear."""
    return sum(experts * RANK * (fan_in + fan_out) for fan_in, fan_out in linears)


def routers(linears: list[tuple[int, int]], experts: int) -> int:
    """E · in per linear."""
    return sum(experts * fan_in for fan_in, _ in linears)


BOTH = ATTENTION + FFN
COUNTS = {  # method → parameters of experts and routers
    "lora": (LAYERS * factors(BOTH, 1), 0),
    "molora": (LAYERS * factors(BOTH, 4), LAYERS * routers(BOTH, 4)),
    "mola": (factors(BOTH, 2 + 4 + 6 + 8), routers(BOTH, 2 + 4 + 6 + 8)),
    "loramoe": (LAYERS * factors(FFN, 4), LAYERS * routers(FFN, 4)),
    "mixlora": (LAYERS * (factors(FFN, 4) + factors(ATTENTION, 1)), LAYERS * 4 * HIDDEN),
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_parameters_is_the_formula_with_the_routers(name):
    _, mixture = attached(METHODS[name])
    experts, router = COUNTS[name]
    assert mixture.num_parameters() == {"experts": experts, "router": router}

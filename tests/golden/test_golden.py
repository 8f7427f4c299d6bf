"""molora reproduces, in float32, what the written-out formulas gave in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from golden import make_goldens
from preset_references import METHODS
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import molora
from molora.presets import PRESETS

FILE = Path(__file__).parent / make_goldens.FILE


class Attention(nn.Module):
    """Two linears with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(*make_goldens.SIZES["self_attn.q_proj"], bias=False)
        self.o_proj = nn.Linear(*make_goldens.SIZES["self_attn.o_proj"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x).tanh())


class FeedForward(nn.Module):
    """A gated FFN."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, nn.Linear(*make_goldens.SIZES[f"mlp.{name}"], bias=False))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Two residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x.tanh())
        return x + self.mlp(x.tanh())


class Stack(nn.Module):
    """The model of the goldens; its loss is half the squared norm of what is no padding."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> CausalLMOutput:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        loss = 0.5 * (hidden_states[attention_mask.bool()] ** 2).sum()
        return CausalLMOutput(loss=loss, logits=hidden_states)


@pytest.fixture(scope="module")
def goldens() -> dict[str, Tensor]:
    return load_file(FILE)


def below(goldens: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in goldens.items() if k.startswith(prefix)}


def adapted_stack(name: str, goldens: Mapping[str, Tensor]) -> tuple[Stack, molora.Mixture]:
    """The base of the goldens with the preset attached and the golden weights loaded."""
    model, method = Stack(make_goldens.num_layers(name)), METHODS[name]
    base = below(goldens, "base.")
    model.load_state_dict({key: base[key] for key in model.state_dict()})
    mixture = molora.attach(model, PRESETS[method.preset](**method.arguments))
    mixture.load_state_dict(below(goldens, f"{name}.state."))
    for site in mixture.built.sites.values():
        site.router.jitter = 0.0  # the switch variant's; the goldens are without noise
    return model.train(), mixture


def run(model: Stack, goldens: Mapping[str, Tensor]) -> CausalLMOutput:
    return model(goldens["x"], attention_mask=goldens["mask"], task_types=goldens["task_types"])


@pytest.mark.parametrize("name", METHODS)
def test_output_loss_and_gradients_are_the_golden_ones(name, goldens):
    model, mixture = adapted_stack(name, goldens)

    out = run(model, goldens)
    out.loss.backward()

    valid = goldens["mask"]
    torch.testing.assert_close(out.logits[valid], goldens[f"{name}.y"][valid], rtol=1e-4, atol=1e-5)
    aux = torch.zeros(()) if out.aux_loss is None else out.aux_loss
    torch.testing.assert_close(aux, goldens[f"{name}.aux"], rtol=1e-5, atol=1e-7)
    gradients = below(goldens, f"{name}.grad.")
    found = {path: parameter.grad for path, parameter in model.named_parameters()}
    assert {path for path, grad in found.items() if grad is not None} == set(gradients)
    for path, expected in gradients.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            found[path], expected, rtol=1e-4, atol=1e-5 * max(1, scale), msg=lambda m, p=path: p + m
        )
        assert scale > 1e-3, f"{path} has no gradient to compare"
    # the controls: the mixture acts, and its experts are not all alike to the tokens
    with mixture.disabled():
        assert (run(model, goldens).logits - out.logits)[valid].abs().max() > 0.1
    with mixture.record() as records:
        run(model, goldens)
    for record in records.values():
        assert len(set(map(tuple, record.gates.round(decimals=2).tolist()))) > 1


@pytest.mark.parametrize("name", METHODS)
def test_a_perturbed_weight_is_found(name, goldens):
    model, mixture = adapted_stack(name, goldens)
    key = next(key for key in mixture.state_dict() if key.endswith("lora_B"))
    mixture.state_dict()[key][-1] *= 1.05
    out, valid = run(model, goldens), goldens["mask"]
    assert not torch.allclose(out.logits[valid], goldens[f"{name}.y"][valid], rtol=1e-4, atol=1e-5)


def test_the_script_makes_the_committed_file(tmp_path, goldens):
    make_goldens.main(tmp_path)
    again = load_file(tmp_path / make_goldens.FILE)
    assert again.keys() == goldens.keys()
    for name, tensor in goldens.items():
        # results may differ in the last bit between processors, drawn weights may not
        exact = ".grad." not in name and not name.endswith((".y", ".aux"))
        tolerance = 0 if exact else 1e-5
        torch.testing.assert_close(again[name], tensor, rtol=tolerance, atol=tolerance)
    assert FILE.stat().st_size < 200_000

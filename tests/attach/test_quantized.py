"""Experts on linears that bitsandbytes quantised, on its CPU path."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import molora
from molora.config import MixtureConfig

EXPERTS = {"num_experts": 3, "rank": 5}
CONFIGS = [
    pytest.param(molora.presets.mola(**EXPERTS, dropout=0.0), id="linear"),
    pytest.param(molora.presets.mixlora(**EXPERTS, dropout=0.0), id="ffn"),
]
QUANTIZED = [
    pytest.param(
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        bnb.nn.Linear4bit,
        id="4bit",
    ),
    pytest.param(BitsAndBytesConfig(load_in_8bit=True), bnb.nn.Linear8bitLt, id="8bit"),
]


def quantized(settings: BitsAndBytesConfig, directory: Path) -> nn.Module:
    tiny("llama").save_pretrained(directory)
    model: nn.Module = LlamaForCausalLM.from_pretrained(
        directory, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # on some CPUs evaluation repacks the weights for good, in blocks that these have not
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(**batch_for(model)).logits
    return result


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("settings", "kind"), QUANTIZED)
def test_life_of_a_mixture_on_a_quantized_base(
    settings: BitsAndBytesConfig, kind: type, config: MixtureConfig, tmp_path: Path
) -> None:
    model = quantized(settings, tmp_path / "base")
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear) is kind
    base, packed = logits(model), linear.weight.detach().clone()
    mixture = molora.attach(model, config)
    assert (logits(model) - base).abs().max() < 1e-5
    randomize(mixture)
    assert (logits(model) - base).abs().max() > 1e-2

    optimiser = torch.optim.AdamW(mixture.parameter_groups(1e-3))
    losses = []
    for _ in range(3):
        out = model.train()(**batch_for(model))
        out.loss.backward()
        for parameters in mixture.trainable_parameters().values():
            assert all(p.grad.abs().max() > 0 for p in parameters)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(out.loss.detach()))
    assert losses[2] < losses[0]
    trained = logits(model.eval())
    mixture.save(tmp_path / "mixture")
    fresh = quantized(settings, tmp_path / "base")
    molora.load(fresh, tmp_path / "mixture")
    assert torch.equal(logits(fresh), trained)

    with mixture.disabled():
        assert torch.equal(logits(model), base)
    mixture.detach()
    assert torch.equal(logits(model), base)
    assert type(linear) is kind
    assert torch.equal(linear.weight, packed)


def test_a_quantized_linear_of_an_unknown_kind_is_refused() -> None:
    class PackedLinear(nn.Module):
        in_features, out_features = 32, 40

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = PackedLinear()
    with pytest.raises(
        molora.AttachError, match=r"up_proj \(PackedLinear\) has that name, but experts go on Linea"
    ):
        molora.attach(model, molora.presets.lora(targets="up_proj"))

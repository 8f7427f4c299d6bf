"""One expert, equal experts, or a router forced to one expert: PEFT's LoRA (B-16, B-26)."""

from typing import Any

import peft
import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn

import molora
from molora.config import MixtureConfig

RANK, ALPHA = 5, 15.0
TARGETS = {
    "llama": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "t5": ["q", "k", "v", "wi", "wo"],
}
FFN_TARGETS = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_fc", "mlp.c_proj"],
    "t5": ["wi", "wo"],
}
LINEAR_CASES = [pytest.param(family, TARGETS[family], "linear", id=family) for family in TARGETS]
CASES = LINEAR_CASES + [
    pytest.param(family, targets, "ffn", id=f"{family}-ffn")
    for family, targets in FFN_TARGETS.items()
]


def mixture_config(targets: list[str], experts: int, **group: Any) -> MixtureConfig:
    expert = {"kind": "lora", "alpha": ALPHA, "scaling": group.pop("scaling", "alpha/r")}
    return MixtureConfig.parse(
        {
            "groups": [
                {
                    "targets": targets,
                    "num_experts": experts,
                    "rank": RANK,
                    "expert": expert,
                    **group,
                }
            ]
        }
    )


def adapted(family: str, config: MixtureConfig) -> tuple[nn.Module, molora.Mixture]:
    """In float64, so that only the float32 gradients of trainables round."""
    model = tiny(family).double()
    mixture = molora.attach(model, config, seed=3)
    randomize(mixture)
    return model.train(), mixture


def lora(
    family: str, targets: list[str], factors: dict[str, Tensor], *, rslora: bool = False
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """PEFT's LoRA with the given factors: `{module path}.lora_A` (R, in) and `.lora_B` (out, R)."""
    model = tiny(family).double()
    settings = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=targets,
        use_rslora=rslora,
        fan_in_fan_out=family == "gpt2",
    )
    # cast below: PEFT keeps its factors in float32, and casts the input to it
    wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    parameters = {}
    for name, parameter in wrapped.base_model.model.named_parameters():
        if "lora_" in name:
            key = name.removesuffix(".default.weight")
            parameter.data = factors[key].double().clone()
            parameters[key] = parameter
    assert parameters.keys() == factors.keys()
    return wrapped.base_model.model.train(), parameters


def expert(mixture: molora.Mixture, index: int) -> dict[str, Tensor]:
    """The factors of one expert of every bank, under PEFT's names."""
    return {
        name.replace(".experts.", "."): tensor[index]
        for name, tensor in mixture.state_dict().items()
        if ".experts." in name
    }


def assert_same_function(model: nn.Module, reference: nn.Module, family: str) -> None:
    batch = batch_for(model)
    out, expected = model(**batch), reference(**batch)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-6, atol=1e-6)
    base = tiny(family).double()(**batch)
    assert (out.logits - base.logits).abs().max() > 1e-2
    out.loss.backward()
    expected.loss.backward()


def assert_same_gradients(
    mixture: molora.Mixture,
    parameters: dict[str, nn.Parameter],
    experts: slice,
    tolerance: float = 1e-6,
) -> None:
    for path, bank in mixture.built.banks.items():
        for name in ("lora_A", "lora_B"):
            gradient = getattr(bank, name).grad[experts].sum(dim=0)
            expected = parameters[f"{path}.{name}"].grad.float()
            assert (gradient - expected).abs().max() <= tolerance * expected.abs().max(), path


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize(("family", "targets", "site"), LINEAR_CASES)
def test_one_expert_is_lora_and_has_no_router(
    family: str, targets: list[str], site: str, scaling: str
) -> None:
    model, mixture = adapted(family, mixture_config(targets, 1, scaling=scaling))
    reference, parameters = lora(
        family, targets, expert(mixture, 0), rslora=scaling == "alpha/sqrt(r)"
    )
    assert_same_function(model, reference, family)
    # 15 / √5 is rounded to float32 here, not there
    tolerance = 1e-6 if scaling == "alpha/r" else 1e-5
    assert_same_gradients(mixture, parameters, slice(None), tolerance)
    assert mixture.trainable_parameters()["router"] == []
    assert mixture.built.sites == {}
    assert not any("router" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    "select",
    [{"kind": "dense"}, {"kind": "top_k", "k": 2}, {"kind": "top_p", "renormalize": True}],
    ids=["dense", "top_k", "top_p"],
)
@pytest.mark.parametrize(("family", "targets", "site"), CASES)
def test_equal_experts_are_lora_whatever_the_router_says(
    family: str, targets: list[str], site: str, select: dict[str, Any]
) -> None:
    config = mixture_config(targets, 4, select=select, site={"kind": site})
    model, mixture = adapted(family, config)
    for name, tensor in mixture.state_dict().items():
        if ".experts." in name:
            tensor[1:] = tensor[:1]
    reference, parameters = lora(family, targets, expert(mixture, 0))
    assert_same_function(model, reference, family)
    assert_same_gradients(mixture, parameters, slice(None))
    # Σ gates is 1 whatever the logits, and equal experts leave nothing else to choose
    routers = [site.router.weight.grad for site in mixture.built.sites.values()]
    assert all(gradient.abs().max() < 1e-6 for gradient in routers)


@pytest.mark.parametrize("chosen", [0, 2])
@pytest.mark.parametrize(
    "select", [{"kind": "dense"}, {"kind": "top_k", "k": 2}], ids=["dense", "top_k"]
)
@pytest.mark.parametrize(("family", "targets", "site"), CASES)
def test_a_router_forced_to_one_expert_is_that_experts_lora(
    family: str, targets: list[str], site: str, select: dict[str, Any], chosen: int
) -> None:
    config = mixture_config(targets, 3, select=select, site={"kind": site})
    model, mixture = adapted(family, config)
    one_hot = torch.eye(3, dtype=torch.float64)[chosen]
    for routing_site in mixture.built.sites.values():
        routing_site.score = lambda logits: logits.softmax(dim=-1) * 0 + one_hot
    reference, parameters = lora(family, targets, expert(mixture, chosen))
    assert_same_function(model, reference, family)
    assert_same_gradients(mixture, parameters, slice(chosen, chosen + 1))
    # the negative control: another expert is another function
    batch = batch_for(model)
    other, _ = lora(family, targets, expert(mixture, 1))
    assert (model(**batch).logits - other(**batch).logits).abs().max() > 1e-2

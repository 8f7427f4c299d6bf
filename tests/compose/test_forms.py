"""Biases, DoRA, low precision and quantised bases below a mixture: what package peft computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from frozen_sets import by_hand, constant, load_set, logits, save_set
from kernel_problems import RUNNABLE
from peft_adapters import edit_tensors, save_adapter
from safetensors.torch import load_file
from tiny_models import batch_for, tiny
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Qwen2ForCausalLM

import molora
from molora.compose.experts import FrozenExperts
from molora.errors import ConfigError

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bias": ("llama", {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}),
    "bias, rsLoRA": (
        "roberta",
        {"lora_bias": True, "use_rslora": True, "target_modules": ["query"]},
    ),
    "bias on conv1d": (
        "gpt2",
        {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
    ),
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "dora beside biases": (
        "qwen2",
        {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    ),
    "dora on conv1d": (
        "gpt2",
        {"use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "dora in an encoder": ("roberta", {"use_dora": True, "target_modules": ["query", "dense"]}),
}


def composed(family: str, experts: FrozenExperts, *weights: float) -> nn.Module:
    model = tiny(family)
    given = dict(zip(experts.names, weights, strict=True))
    molora.compose(model, experts, router={"kind": "fixed", "weights": given})
    return model


@pytest.mark.parametrize("form", FORMS)
def test_gate_1_is_peft_gate_0_the_base_and_half_is_between(tmp_path: Path, form: str) -> None:
    family, settings = FORMS[form]
    dirs = save_set(tmp_path, {"one": settings}, family)
    experts = molora.load_experts(dirs)
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(dirs["one"])).eval()
    whole, base = logits(theirs.get_base_model()), logits(tiny(family))
    torch.testing.assert_close(logits(composed(family, experts, 1.0)), whole, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(logits(composed(family, experts, 0.0)), base, atol=3e-6, rtol=3e-6)
    half = by_hand(experts, constant(0.5), family)
    torch.testing.assert_close(logits(composed(family, experts, 0.5)), half, atol=3e-5, rtol=3e-5)
    for one, other in ((whole, base), (whole, half), (half, base)):
        assert (one - other).abs().max() > 1e-3


MIXED = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "up_proj"]},
    "other": {"r": 6, "target_modules": ["q_proj", "down_proj"]},
    "both": {"use_dora": True, "r": 2, "target_modules": ["down_proj"]},
}


@pytest.mark.parametrize("backend", RUNNABLE)
def test_all_forms_in_one_bank_and_every_backend(tmp_path: Path, backend: str) -> None:
    experts = load_set(tmp_path, MIXED)
    weights = (0.5, -0.7, 1.5, 0.2, 0.4)
    given = dict(zip(MIXED, weights, strict=True))
    model = tiny("llama")
    molora.compose(model, experts, router={"kind": "fixed", "weights": given}, backend=backend)
    expected = by_hand(experts, constant(*weights))
    torch.testing.assert_close(logits(model), expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("top_k", [1, 2, "all"])
def test_gates_get_the_gradients_of_dense_algebra(
    tmp_path: Path, backend: str, top_k: int | str
) -> None:
    experts = load_set(tmp_path, MIXED)
    found = _router_gradients(experts, backend=backend, top_k=top_k)
    expected = _router_gradients(experts, by_hand_at=experts.modules, top_k=top_k)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-2


def _router_gradients(
    experts: FrozenExperts,
    *,
    by_hand_at: tuple[str, ...] = (),
    top_k: int | str,
    backend: str = "reference",
) -> dict[str, Tensor]:
    """Of every router; the update computed by dense algebra at `by_hand_at`."""
    from frozen_sets import update

    model = tiny("llama").double()
    router = {"kind": "linear", "top_k": top_k}
    if top_k == 1:
        router = {"kind": "hard_top1", "scope": "linear"}
    mixture = molora.compose(
        model,
        experts,
        router=router,
        backend=backend,
        missing="zero",
    )
    for path in by_hand_at:
        linear = model.get_submodule(path)
        site = mixture.built.sites[path]

        def forward(x: Tensor, linear: nn.Module = linear, site: Any = site) -> Tensor:
            gates_TE = site.decide(x).dense_gates().view(*x.shape[:-1], -1)
            y = x @ linear.weight.T
            for number, adapter in enumerate(experts.adapters.values()):
                if site.name in adapter.modules:
                    y = y + gates_TE[..., number, None] * update(linear, adapter, site.name, x)
            return y

        linear.forward = forward
    model.train()(**batch_for(model)).loss.backward()
    return {
        path: site.router.weight.grad
        for path, site in mixture.built.sites.items()
        if site.router.weight.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stay_in_their_type_in_memory_and_in_the_file(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    dirs = save_set(tmp_path, {"low": {"lora_bias": True}, "high": {}})
    edit_tensors(dirs["low"], lambda t: t.update({name: t[name].to(dtype) for name in t}))
    experts = molora.load_experts(dirs)
    model = tiny("llama")
    mixture = molora.compose(model, experts, router="uniform")
    expected = by_hand(experts, constant(0.5, 0.5))
    torch.testing.assert_close(logits(model), expected, atol=3e-5, rtol=3e-5)
    mixture.save(tmp_path / "saved")
    (stored,) = (tmp_path / "saved").glob("*.safetensors")
    path = "model.layers.0.self_attn.q_proj"
    names = {"lora_A": dtype, "lora_B": dtype, "bias": dtype, "1.lora_A": torch.float32}
    file, bank = load_file(stored), mixture.built.banks[path]
    for name, kind in names.items():
        assert bank.get_parameter(name).dtype == kind
        assert file[f"{path}.experts.{name}"].dtype == kind
    module = experts.adapters["low"].modules[path]
    assert torch.equal(file[f"{path}.experts.lora_A"][0], module.lora_A)
    model.bfloat16()
    assert bank.get_parameter("1.lora_A").dtype == torch.float32
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("form", ["dora", "dora beside biases"])
def test_dora_on_a_base_in_bfloat16_is_that_of_peft_to_rounding(tmp_path: Path, form: str) -> None:
    family, settings = FORMS[form]
    dirs = save_set(tmp_path, {"one": settings}, family)
    model = tiny(family).bfloat16()
    theirs = peft.PeftModel.from_pretrained(tiny(family).bfloat16(), str(dirs["one"])).eval()
    given = {"kind": "fixed", "weights": {"one": 1.0}}
    mixture = molora.compose(model, molora.load_experts(dirs), router=given)
    exact = molora.compose(tiny(family), molora.load_experts(dirs), router=given)
    for path, bank in mixture.built.banks.items():
        # the base's rows are rounded, their norms must not be rounded again
        rows_F = model.get_submodule(path).weight.float()
        factors = molora.load_experts(dirs).adapters["one"].modules[path]
        rows_F = (rows_F + factors.scaling * factors.lora_B @ factors.lora_A).norm(dim=1)
        torch.testing.assert_close(bank.row_scale[0], factors.magnitude / rows_F)
        assert not torch.equal(bank.row_scale, exact.built.banks[path].row_scale)
    gap = logits(model).float() - logits(theirs.get_base_model()).float()
    assert gap.abs().mean() < 0.02


QUANTIZED = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}


def quantized(kind: str, family: str, directory: Path) -> nn.Module:
    tiny(family).save_pretrained(directory)
    model_class = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[family]
    model: nn.Module = model_class.from_pretrained(
        directory,
        quantization_config=QUANTIZED[kind],
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # on some CPUs evaluation repacks the weights for good, in blocks that these have not
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize(
    ("family", "form"), [("llama", "plain"), ("llama", "dora"), ("qwen2", "dora beside biases")]
)
def test_a_quantised_base_gives_what_peft_gives(
    tmp_path: Path, kind: str, family: str, form: str
) -> None:
    settings = {} if form == "plain" else FORMS[form][1]
    dirs = save_set(tmp_path / "experts", {"one": settings, "two": {}}, family)
    model = quantized(kind, family, tmp_path / "base")
    base = logits(model)
    theirs = peft.PeftModel.from_pretrained(
        quantized(kind, family, tmp_path / "base"), str(dirs["one"])
    ).eval()
    mixture = molora.compose(
        model,
        molora.load_experts(dirs),
        router={"kind": "fixed", "weights": {"one": 1.0, "two": 0.0}},
    )
    # at each linear: in 8 bits an input that rounds to another integer changes all that follows
    for path in molora.load_experts(dirs).adapters["one"].modules:
        x = torch.randn(7, model.get_submodule(path).in_features)
        with torch.no_grad():
            found, expected = (m.get_submodule(path)(x) for m in (model, theirs.get_base_model()))
            with mixture.disabled():
                plain = model.get_submodule(path)(x)
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=5e-4)
        assert (found - plain).abs().max() > 0.05
    assert (logits(model) - base).abs().max() > 0.05
    mixture.detach()
    assert torch.equal(logits(model), base)


def test_what_acts_in_some_places_only_is_refused_by_name(tmp_path: Path) -> None:
    save_adapter(tmp_path / "dora", use_dora=True)
    save_adapter(tmp_path / "bias", lora_bias=True)
    for name, what in (("dora", "a magnitude"), ("bias", "biases")):
        experts = molora.load_experts({name: tmp_path / name})
        with pytest.raises(ConfigError, match=f"trainable: {name} has {what}"):
            molora.compose(tiny("llama"), experts, router="linear", trainable=[name])

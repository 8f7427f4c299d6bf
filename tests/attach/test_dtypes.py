"""Low precision: routers decide in float32 (B-14), outputs have the base's dtype (B-15)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn

import molora
from molora.config import MixtureConfig

EXPERTS = {"num_experts": 3, "rank": 5}
LINEAR = molora.presets.mola(**EXPERTS, dropout=0.0)
FFN = molora.presets.mixlora(**EXPERTS, dropout=0.0)
autocast = partial(torch.autocast, "cpu", torch.bfloat16)


def adapted(
    family: str, config: MixtureConfig, dtype: torch.dtype, directory: Path
) -> tuple[nn.Module, molora.Mixture]:
    """Loaded in `dtype`, as users do: some families keep some modules in float32 then."""
    source = tiny(family)
    source.save_pretrained(directory)
    model = type(source).from_pretrained(directory, dtype=dtype).eval()
    mixture = molora.attach(model, config)
    randomize(mixture)
    return model, mixture


@pytest.mark.parametrize(
    ("dtype", "context"),
    [
        pytest.param(torch.float32, nullcontext, id="float32"),
        pytest.param(torch.bfloat16, nullcontext, id="bfloat16"),
        pytest.param(torch.float16, nullcontext, id="float16"),
        pytest.param(torch.float32, autocast, id="autocast"),
        pytest.param(torch.bfloat16, autocast, id="bfloat16_autocast"),
    ],
)
@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("llama", LINEAR, id="llama-linear"),
        pytest.param("llama", FFN, id="llama-ffn"),
        pytest.param("gpt2", FFN, id="gpt2-ffn"),
        pytest.param("phi3", FFN, id="phi3-ffn"),
        pytest.param("t5", LINEAR, id="t5-linear"),
        pytest.param("t5_gated", FFN, id="t5_gated-ffn"),
    ],
)
def test_every_module_gives_the_dtype_that_the_base_gives(
    family: str,
    config: MixtureConfig,
    dtype: torch.dtype,
    context: Callable[[], AbstractContextManager[Any]],
    tmp_path: Path,
) -> None:
    model, mixture = adapted(family, config, dtype, tmp_path)
    batch = batch_for(model)
    found: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if not name.endswith(("experts", "router")):
            module.register_forward_hook(lambda _, args, y, name=name: _note(found, name, y))
    with torch.no_grad(), context(), mixture.disabled():
        base = model(**batch).logits
    expected = dict(found)
    found.clear()
    with context():
        out = model.train()(**batch)
    out.loss.backward()
    # the FFN site calls its projections itself
    assert {name: expected[name] for name in found} == found
    assert set(expected) - set(found) <= {
        n for n in expected if n.rpartition(".")[0] in mixture.built.sites
    }
    assert out.logits.dtype == base.dtype
    assert (out.logits - base).abs().max() > 1e-2
    for parameters in mixture.trainable_parameters().values():
        assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters}
        assert {p.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize(
    "cast",
    [
        pytest.param(nn.Module.bfloat16, id="bfloat16"),
        pytest.param(nn.Module.half, id="half"),
        pytest.param(lambda model: model.to(torch.bfloat16), id="to"),
        pytest.param(lambda model: model.to("cpu", torch.float16), id="to_device_and_dtype"),
        pytest.param(nn.Module.double, id="double"),
    ],
)
def test_casting_the_model_leaves_trainables_in_float32_to_the_bit(
    cast: Callable[[nn.Module], nn.Module],
) -> None:
    model = tiny("llama")
    mixture = molora.attach(model, LINEAR)
    randomize(mixture)
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    parameters = [id(p) for ps in mixture.trainable_parameters().values() for p in ps]
    cast(model)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype != torch.float32
    for name, tensor in mixture.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
    assert [id(p) for ps in mixture.trainable_parameters().values() for p in ps] == parameters
    assert model(**batch_for(model)).logits.isfinite().all()


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_logits_closer_than_bfloat16_can_tell_choose_the_right_expert(mode: str) -> None:
    model = tiny("llama")
    mixture = molora.attach(model, LINEAR)
    randomize(mixture)
    source = torch.Generator().manual_seed(0)
    for site in mixture.built.sites.values():
        row = site.router.weight.detach()[:1].clone()
        noise = torch.randn(site.router.weight.shape, generator=source)
        site.router.weight.data = row * (1 + 1e-4 * noise)
    if mode == "bfloat16":
        model.bfloat16()
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in mixture.built.sites:
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)})
            )
    precision = autocast() if mode == "autocast" else nullcontext()
    with torch.no_grad(), precision, mixture.record() as records:
        model(**batch_for(model))
    wrong = 0
    for name, record in records.items():
        weight = mixture.built.sites[name].router.weight
        exact = inputs[name].double() @ weight.double().T
        low = inputs[name].bfloat16() @ weight.bfloat16().T
        assert record.logits.dtype == torch.float32
        torch.testing.assert_close(record.logits.double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(record.expert_index[:, 0], exact.argmax(dim=-1))
        wrong += int((low.argmax(dim=-1) != exact.argmax(dim=-1)).sum())
    assert wrong > 10  # the negative control: in bfloat16 many tokens would go elsewhere


def test_trainables_can_be_declared_in_another_dtype() -> None:
    model = tiny("llama").bfloat16()
    mixture = molora.attach(model, LINEAR.model_copy(update={"dtype": "bfloat16"}))
    randomize(mixture)
    assert {t.dtype for t in mixture.state_dict().values()} == {torch.bfloat16}
    model.train()(**batch_for(model)).loss.backward()
    model.float()
    assert {t.dtype for t in mixture.state_dict().values()} == {torch.bfloat16}
    assert {s.router.weight.grad.dtype for s in mixture.built.sites.values()} == {torch.bfloat16}


def _note(found: dict[str, torch.dtype], name: str, y: Any) -> None:
    y = y[0] if isinstance(y, tuple) else y
    if isinstance(y, Tensor):
        found[name] = y.dtype

"""Projections that read the same tensor share one product; those that do not, and those whose
module somebody watches, make their own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn

import molora
from molora.kernels.lora_mix import dense


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(down-projections, routers) of each product that is made."""
    made: list[tuple[int, int]] = []
    down = dense.down

    def counted(
        x: Tensor, factors: list[Tensor], routers: list[Tensor], **options: object
    ) -> object:
        made.append((len(factors), len(routers)))
        return down(x, factors, routers, **options)

    monkeypatch.setattr(dense, "down", counted)
    return made


def adapted(**settings: object) -> tuple[nn.Module, molora.Mixture]:
    model = tiny("llama")
    options = {
        "num_experts": 4,
        "top_k": 2,
        "rank": 3,
        "losses": (),
        "backend": "dense",
        "dropout": 0.0,
        **settings,
    }
    mixture = molora.attach(model, molora.presets.mola(**options), seed=0)
    source = torch.Generator().manual_seed(3)
    for bank in mixture.built.banks.values():
        for p in bank.parameters():
            p.data = torch.randn(p.shape, generator=source) / 3
    return model.train(), mixture


def linears(mixture: molora.Mixture) -> list[molora.modules.MoLoRALinear]:
    return [mixture.model.get_submodule(path).forward.__self__ for path in mixture.built.banks]


def step(model: nn.Module, mixture: molora.Mixture) -> dict[str, Tensor]:
    ids = torch.arange(14).view(2, 7) + 5
    out = model(input_ids=ids, labels=ids)
    model.zero_grad()
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def test_a_block_makes_one_product_per_tensor(products: list[tuple[int, int]]) -> None:
    model, mixture = adapted()
    shared = step(model, mixture)
    layers = model.config.num_hidden_layers
    # q, k, v; o; gate, up; down
    assert products == [(3, 3), (1, 1), (2, 2), (1, 1)] * layers
    products.clear()
    model, mixture = adapted(share_products=False)
    separate = step(model, mixture)
    assert products == [(1, 1)] * 7 * layers
    for name, value in separate.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-4)
    assert len(separate) == 1 + 7 * 3 * layers
    mixture.built.banks["model.layers.0.self_attn.v_proj"].lora_A.data.mul_(1.01)
    other = step(model, mixture)
    assert not torch.allclose(other["logits"], separate["logits"], rtol=1e-3, atol=1e-4)


def test_dropout_has_a_mask_for_each_linear_but_one_product_of_the_routers(
    products: list[tuple[int, int]],
) -> None:
    model, _ = adapted(dropout=0.5, targets=["q_proj", "k_proj", "v_proj"])
    model(input_ids=torch.arange(6)[None])
    assert products[0] == (0, 3)
    products.clear()
    model.eval()(input_ids=torch.arange(6)[None])
    assert products[0] == (3, 3)


def test_a_sibling_that_reads_another_tensor_makes_its_own_product() -> None:
    model, _ = adapted()
    attention = model.get_submodule("model.layers.0.self_attn")
    x = torch.randn(1, 5, attention.q_proj.in_features)
    other = x + 1.0
    with torch.no_grad():  # where nothing is shared
        expected = [attention.k_proj(x), attention.k_proj(other), attention.v_proj(x)]
    attention.q_proj(x)
    found = [attention.k_proj(other).detach(), attention.v_proj(x).detach()]
    torch.testing.assert_close(found, expected[1:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2)


def test_a_router_that_is_watched_is_called() -> None:
    model, mixture = adapted()
    seen: list[str] = []
    path = "model.layers.0.self_attn.k_proj"
    mixture.built.sites[path].router.register_forward_hook(lambda *args: seen.append(path))
    model(input_ids=torch.arange(6)[None])
    assert seen == [path]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_after_the_block(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mixture = adapted()
    kept: list[weakref.ref[Tensor]] = []

    def note(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor) -> Tensor:
            kept.append(weakref.ref(x))
            if fails:
                raise RuntimeError("in the middle of the block")
            return function(x)

        return forward

    adapted_linears = linears(mixture)
    key = model.get_submodule("model.layers.0.self_attn.k_proj")
    monkeypatch.setitem(key.__dict__, "forward", note(key.__dict__["forward"]))
    try:
        model(input_ids=torch.arange(6)[None])
    except RuntimeError:
        assert fails
    gc.collect()
    assert [reference() for reference in kept] == [None]
    assert not any(linear.product._made for linear in adapted_linears)

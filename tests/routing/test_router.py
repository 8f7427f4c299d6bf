"""The router works in float32 whatever surrounds it, and is random in training only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from molora.routing import LinearRouter
from molora.routing.router import _Float32Linear

half_precisions = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def router(num_experts: int = 3, in_features: int = 8, **settings: float) -> LinearRouter:
    source = torch.Generator().manual_seed(7)
    made = LinearRouter(torch.randn(num_experts, in_features, generator=source), **settings)
    return made.eval()


def test_logits_are_the_linear_map_over_the_temperature():
    x_TD = torch.randn(5, 8)
    made = router(temperature=0.25)
    torch.testing.assert_close(made(x_TD), 4 * nn.functional.linear(x_TD, made.weight))
    assert made(torch.zeros(0, 8)).shape == (0, 3)


# ------------------------------------------------------------------ precision (B-14)


@half_precisions
def test_experts_closer_than_the_resolution_of_autocast_are_told_apart(dtype):
    rows, in_features = 6, 16
    x_TD = torch.ones(rows, in_features, dtype=dtype)
    # expert 2 is the best by a quarter of the dtype's resolution at 1
    weight_ED = torch.ones(4, in_features)
    weight_ED[2] += torch.finfo(dtype).eps / 4

    with torch.autocast("cpu", dtype=dtype):
        logits_TE = LinearRouter(weight_ED)(x_TD)
        tied_TE = nn.functional.linear(x_TD, weight_ED)

    assert logits_TE.dtype == torch.float32
    assert logits_TE.argmax(dim=-1).tolist() == [2] * rows
    assert (logits_TE[:, 2] > logits_TE[:, 0]).all()
    # the control: without the router's own precision all four tie
    assert tied_TE.dtype == dtype
    assert (tied_TE == tied_TE[:, :1]).all()


@half_precisions
def test_logits_of_a_low_precision_input_are_those_of_float64(dtype):
    x_TD = torch.randn(40, 64).to(dtype)
    made = router(in_features=64)
    exact_TE = x_TD.double() @ made.weight.double().T
    torch.testing.assert_close(made(x_TD).double(), exact_TE, rtol=1e-5, atol=1e-5)
    rounded_TE = (x_TD @ made.weight.to(dtype).T).double()
    assert not torch.allclose(rounded_TE, exact_TE, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.bfloat16,
        nn.Module.half,
        nn.Module.float,
        nn.Module.double,
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
    ],
    ids=["bfloat16", "half", "float", "double", "to", "to_device_and_dtype"],
)
def test_casting_the_model_leaves_the_router_bit_for_bit(cast):
    made = router()
    before = made.weight.detach().clone()
    model = nn.Sequential(nn.Linear(8, 8), made)
    plain = model[0].weight.detach().clone()

    cast(model)

    assert made.weight.dtype == torch.float32
    assert torch.equal(made.weight, before)
    assert isinstance(made.weight, nn.Parameter)
    # the control: the cast did reach the model
    if model[0].weight.dtype in (torch.bfloat16, torch.float16):
        assert not torch.equal(model[0].weight.float(), plain)


def test_a_cast_keeps_the_gradient_and_moves_between_devices():
    made = router()
    made(torch.randn(2, 8)).sum().backward()
    gradient = made.weight.grad.clone()
    made.bfloat16()
    assert torch.equal(made.weight.grad, gradient)
    made.to(torch.device("meta"), torch.bfloat16)
    assert made.weight.is_meta
    assert made.weight.dtype == torch.float32


def test_a_stored_low_precision_router_computes_in_float32():
    made = LinearRouter(torch.randn(3, 8).bfloat16())
    x_TD = torch.randn(4, 8)
    assert torch.equal(made(x_TD), x_TD @ made.weight.float().T)
    assert made(x_TD.bfloat16()).dtype == torch.float32
    made(x_TD).sum().backward()
    assert made.weight.grad.dtype == torch.bfloat16


# ------------------------------------------------------------------ gradients


def test_gradients_pass_gradcheck():
    x_TD = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight_ED = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Float32Linear.apply, (x_TD, weight_ED))
    assert torch.autograd.gradgradcheck(_Float32Linear.apply, (x_TD, weight_ED))


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["x_only", "weight_only"])
def test_only_the_needed_gradient_is_made(needed):
    x_TD = torch.randn(4, 6, requires_grad=needed[0])
    weight_ED = torch.randn(3, 6, requires_grad=needed[1])
    _Float32Linear.apply(x_TD, weight_ED).sum().backward()
    assert [x_TD.grad is not None, weight_ED.grad is not None] == list(needed)


@half_precisions
def test_gradient_of_the_weight_is_not_rounded_and_x_is_saved_as_it_is(dtype):
    x_TD = torch.randn(50, 8).to(dtype).requires_grad_()
    made = router()
    grad_TE = torch.randn(50, 3)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits_TE = made(x_TD)
    logits_TE.backward(grad_TE)

    exact_ED = grad_TE.double().T @ x_TD.detach().double()
    torch.testing.assert_close(made.weight.grad.double(), exact_ED, rtol=1e-5, atol=1e-5)
    assert x_TD.grad.dtype == dtype
    assert {t.dtype for t in saved if t.shape == x_TD.shape} == {dtype}


# ------------------------------------------------------------------ noise and jitter


def test_noise_has_its_standard_deviation_in_training_and_is_absent_in_evaluation():
    x_TD = torch.randn(5000, 8)
    made, plain = router(noise_std=0.5), router()
    assert torch.equal(made(x_TD), plain(x_TD))

    noise_TE = (made.train()(x_TD) - plain(x_TD)).detach()

    assert noise_TE.std().item() == pytest.approx(0.5, rel=0.05)
    assert noise_TE.mean().item() == pytest.approx(0, abs=0.02)
    assert not torch.equal(made(x_TD), made(x_TD))


def test_jitter_multiplies_the_input_in_training_and_leaves_the_callers_tensor_alone():
    x_TD = torch.rand(2000, 8) + 1
    before = x_TD.clone()
    made = LinearRouter(torch.eye(8), jitter=0.1).eval()
    assert torch.equal(made(x_TD), x_TD)

    factor_TE = (made.train()(x_TD) / x_TD).detach()

    assert 0.9 - 1e-6 <= factor_TE.min() < 0.901
    assert 1.099 < factor_TE.max() <= 1.1 + 1e-6
    assert factor_TE.mean().item() == pytest.approx(1, abs=0.002)
    assert torch.equal(x_TD, before)


def test_without_noise_and_jitter_training_is_evaluation():
    x_TD = torch.randn(4, 8)
    assert torch.equal(router().train()(x_TD), router()(x_TD))

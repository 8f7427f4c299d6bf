"""Inputs kept, outputs made again: the same numbers for less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from molora.modules.recompute import recomputed


def function(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight) * x.sum(dim=-1, keepdim=True)


def inputs(*, frozen: bool = False) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 3, generator=source, dtype=torch.float64) for n in (5, 3))
    return x.requires_grad_(not frozen), weight.requires_grad_()


def gradients(x: Tensor, weight: Tensor, output: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(output.sin().sum(), [x, weight], allow_unused=True)


def test_values_and_gradients_are_those_of_the_function() -> None:
    x, weight = inputs()
    expected, found = function(x, weight), recomputed(function, x, weight)
    assert torch.equal(found, expected)
    for left, right in zip(
        gradients(x, weight, found), gradients(x, weight, expected), strict=True
    ):
        assert torch.equal(left, right)
    # of its inputs alone: what it closes over is a constant
    assert gradients(x, weight, recomputed(lambda w: function(x, w), weight))[0] is None


def test_an_input_without_gradient_gets_none() -> None:
    x, weight = inputs(frozen=True)
    output = recomputed(function, x, weight)
    (grad,) = torch.autograd.grad(output.sum(), [weight])
    assert grad.abs().max() > 0.1
    with torch.no_grad():
        assert recomputed(function, x, weight).grad_fn is None


def saved(run: object) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()  # type: ignore[operator]
    del kept
    return sum(sizes.values())


def test_only_inputs_are_kept() -> None:
    x, weight = inputs()
    size = (x.numel() + weight.numel()) * 8
    assert saved(lambda: recomputed(function, x, weight)) == size
    assert saved(lambda: function(x, weight)) > size


def test_a_second_derivative_is_refused() -> None:
    x, weight = inputs()
    (grad,) = torch.autograd.grad(recomputed(function, x, weight).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_autocast_is_that_of_the_forward() -> None:
    x, weight = (value.detach().float().requires_grad_() for value in inputs())
    seen: list[torch.dtype] = []

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        product = x @ weight
        seen.append(product.dtype)
        return product

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = recomputed(noted, x, weight)
    output.float().sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    recomputed(noted, x, weight).sum().backward()
    assert seen[2:] == [torch.float32, torch.float32]


def test_it_nests_in_activation_checkpointing() -> None:
    x, weight = inputs()
    expected = gradients(x, weight, function(x, weight))
    output = checkpoint(recomputed, function, x, weight, use_reentrant=False)
    for left, right in zip(gradients(x, weight, output), expected, strict=True):
        assert torch.equal(left, right)

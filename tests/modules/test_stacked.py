"""A base's own experts in every layout that transformers has, against sums over their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_reads import HostReads
from torch import Tensor, nn
from torch.nn import functional as F

from molora.errors import AttachError
from molora.experts import Block, ExpertBank
from molora.kernels import backend
from molora.modules import ForwardContext, RoutingSite
from molora.modules.stacked import MoLoRAStackedExperts, StackedProjection, assigned
from molora.routing.router import LinearRouter
from molora.routing.scores import softmax
from molora.routing.select import dense

TOKENS, WIDTH, INNER, BASE, EXPERTS, RANK, CHOSEN = 9, 12, 10, 5, 3, 2, 2
DOUBLE = torch.float64


class Stacked(nn.Module):
    """Weights (E_b, out, in), or (E_b, in, out) if transposed, with biases."""

    def __init__(self, *, transposed: bool, gated: bool) -> None:
        super().__init__()
        out = 2 * INNER if gated else INNER
        shapes = {"up": (out, WIDTH), "down": (WIDTH, INNER)}
        for name, (rows, columns) in shapes.items():
            weight = torch.randn(BASE, rows, columns, dtype=DOUBLE)
            weight = weight.transpose(1, 2).contiguous() if transposed else weight
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            bias = torch.randn(BASE, rows, dtype=DOUBLE)
            self.register_parameter(f"{name}_bias", nn.Parameter(bias, requires_grad=False))


def bank(size_in: int, size_out: int) -> ExpertBank:
    pairs = EXPERTS * BASE
    return ExpertBank(
        [
            Block(
                torch.randn(pairs, RANK, size_in),
                torch.randn(pairs, size_out, RANK),
                torch.linspace(0.5, 2, EXPERTS).repeat_interleave(BASE),
                trainable=False,
            )
        ],
        backend=backend("auto"),
    )


def activate(gated: bool, y: Tensor) -> Tensor:
    if not gated:
        return F.relu(y)
    return F.silu(y[..., ::2]) * (1 + y[..., 1::2])


def made(*, transposed: bool = False, biased: bool = True, gated: bool = True) -> Any:
    torch.manual_seed(0)
    base, context = Stacked(transposed=transposed, gated=gated), ForwardContext()
    site = RoutingSite(
        "base",
        LinearRouter(torch.randn(EXPERTS, WIDTH)),
        score=softmax,
        select=dense,
        capacity=None,
        stream="input",
        context=context,
    )
    sizes = {"up": (WIDTH, 2 * INNER if gated else INNER), "down": (INNER, WIDTH)}
    inner, outer = (
        StackedProjection(
            base,
            name,
            transposed=transposed,
            biased=biased,
            experts=bank(*size),
            decision=site,
        )
        for name, size in sizes.items()
    )
    return MoLoRAStackedExperts(
        lambda x, index, weights: x,
        inner,
        outer,
        num_base=BASE,
        num_experts=EXPERTS,
        context=context,
        activate=lambda y: activate(gated, y),
        finish=lambda y: 3 * y,
    )


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=DOUBLE)
    # the base's expert 4 gets no token
    index_TK = torch.rand(TOKENS, BASE - 1).topk(CHOSEN).indices
    return x_TD, index_TK, torch.rand(TOKENS, CHOSEN, dtype=DOUBLE)


def by_hand(glue: Any, gated: bool) -> Tensor:
    """Token by token, weight by weight."""
    x_TD, index_TK, weights_TK = inputs()
    gates_TE = (x_TD.float() @ glue.inner.decision.router.weight.T).softmax(-1).double()

    def layer(projection: Any, x_D: Tensor, token: int, j: int) -> Tensor:
        weight_FD = projection.base.get_parameter(projection.name)[j]
        weight_FD = weight_FD.T if projection.transposed else weight_FD
        for e in range(EXPERTS):
            pair, own = e * BASE + j, projection.experts
            added = own.lora_B[pair].double() @ own.lora_A[pair].double()
            weight_FD = weight_FD + gates_TE[token, e] * own.scaling[pair].double() * added
        y_F = weight_FD @ x_D
        bias = projection.base.get_parameter(f"{projection.name}_bias")[j]
        return y_F + bias if projection.biased else y_F

    rows = []
    for t in range(TOKENS):
        y_D = torch.zeros(WIDTH, dtype=DOUBLE)
        for j, w in zip(index_TK[t].tolist(), weights_TK[t], strict=True):
            a = activate(gated, layer(glue.inner, x_TD[t], t, j))
            y_D = y_D + w * 3 * layer(glue.outer, a, t, j)
        rows.append(y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("transposed", [False, True], ids=["out, in", "in, out"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("gated", [False, True], ids=["one", "gated"])
def test_every_layout_is_the_sum_over_weights(transposed: bool, biased: bool, gated: bool) -> None:
    glue = made(transposed=transposed, biased=biased, gated=gated)
    expected = by_hand(glue, gated)
    ours = glue.forward(*inputs())
    assert ours.dtype == DOUBLE
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-6)
    glue.outer.experts.scaling[0] += 1
    assert (by_hand(glue, gated) - expected).abs().max() > 1e-2


def test_rows_are_sorted_once_and_find_back() -> None:
    _, index_TK, _ = inputs()
    rows = assigned(index_TK, BASE)
    assert torch.equal(rows.expert_N, index_TK.flatten().sort().values)
    assert torch.equal(index_TK.flatten()[rows.place_N], rows.expert_N)
    assert torch.equal(rows.place_N // CHOSEN, rows.token_N)
    counts = torch.bincount(index_TK.flatten(), minlength=BASE).cumsum(0)
    assert torch.equal(rows.offsets_G.long(), counts)


def test_low_precision_is_no_worse_than_the_weights_own() -> None:
    glue = made()
    expected, (x, index, weights) = by_hand(glue, True), inputs()
    glue.inner.base.to(torch.bfloat16)
    low = x.to(torch.bfloat16)
    ours = glue.forward(low, index, weights.to(torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - expected).norm() < 0.05 * expected.norm()


def test_disabled_it_is_the_base_and_odd_calls_are_refused() -> None:
    glue = made()
    x, index, weights = inputs()
    with pytest.raises(AttachError, match="needs a weight for each index"):
        glue.forward(x, index, weights[:, :1])
    glue.context.enabled = False
    assert glue.forward(x, index, weights) is x


def test_nothing_waits_for_the_device() -> None:
    glue, given = made(), [t.float() if t.is_floating_point() else t for t in inputs()]
    for parameter in glue.inner.base.parameters():
        parameter.data = parameter.data.float()
    with HostReads() as host:
        glue.forward(*given)
    assert not host.reads

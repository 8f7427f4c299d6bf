"""Whole-FFN experts in real models, against FFN_e computed one expert at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn
from torch.nn import functional as F

import molora
from molora.config import MixtureConfig

Linear = Callable[[str, Tensor], Tensor]


def gated(act: Callable[[Tensor], Tensor], gate: str, up: str, down: str) -> Any:
    return lambda linear, x: linear(down, act(linear(gate, x)) * linear(up, x))


def plain(act: Callable[[Tensor], Tensor], up: str, down: str) -> Any:
    return lambda linear, x: linear(down, act(linear(up, x)))


def phi3(linear: Linear, x: Tensor) -> Tensor:
    gate, up = linear("gate_up_proj", x).chunk(2, dim=-1)
    return linear("down_proj", up * F.silu(gate))


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# family → its FFN modules, and FFN(linear, x) with linear(name, x) = W_name x + b
FFNS: dict[str, tuple[str, Callable[[Linear, Tensor], Tensor]]] = {
    "llama": ("mlp", gated(F.silu, "gate_proj", "up_proj", "down_proj")),
    "gemma2": ("mlp", gated(gelu, "gate_proj", "up_proj", "down_proj")),
    "phi3": ("mlp", phi3),
    "gpt2": ("mlp", plain(gelu, "c_fc", "c_proj")),
    "t5": ("DenseReluDense", plain(F.relu, "wi", "wo")),
    "t5_gated": ("DenseReluDense", gated(gelu, "wi_0", "wi_1", "wo")),
}


def expected(
    family: str,
    ffn: nn.Module,
    x_TD: Tensor,
    *,
    scaling: float,
    select: Callable[[Tensor], Tensor],
) -> Tensor:
    """Σ_e g_e FFN_e(x) with FFN_e's weights written out, W + scaling · B_e A_e."""
    gates_TE = select(torch.softmax(x_TD @ ffn.router.weight.to(x_TD).T, dim=-1))
    y_TD = torch.zeros_like(x_TD)
    for e in range(gates_TE.shape[1]):

        def linear(name: str, x: Tensor, e: int = e) -> Tensor:
            module = getattr(ffn, name)
            weight = module.weight.T if hasattr(module, "nf") else module.weight  # Conv1D is W^T
            if hasattr(module, "experts"):
                lora_B, lora_A = module.experts.lora_B.to(x), module.experts.lora_A.to(x)
                e = e if len(lora_B) > 1 else 0
                weight = weight + scaling * lora_B[e] @ lora_A[e]
            return F.linear(x, weight, module.bias)

        y_TD = y_TD + gates_TE[:, e : e + 1] * FFNS[family][1](linear, x_TD)
    return y_TD


def top_2(scores_TE: Tensor) -> Tensor:
    best = scores_TE.topk(2, dim=-1)
    return torch.zeros_like(scores_TE).scatter(
        1, best.indices, best.values / best.values.sum(dim=-1, keepdim=True)
    )


def mass_above(scores_TE: Tensor) -> Tensor:
    """Not renormalised: the best experts until their sum exceeds 0.7."""
    best = scores_TE.sort(dim=-1, descending=True)
    kept = best.values * (best.values.cumsum(dim=-1) - best.values <= 0.7)
    return torch.zeros_like(scores_TE).scatter(1, best.indices, kept)


def calls_of_ffns(family: str, config: MixtureConfig) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """(FFN, its input, its output) in a forward of the float64 model over a ragged batch."""
    model = tiny(family).double()
    randomize(molora.attach(model, config))
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith(FFNS[family][0]):
            module.register_forward_hook(
                lambda ffn, args, y: calls.append((ffn, args[0].flatten(0, 1), y.flatten(0, 1)))
            )
    with torch.no_grad():
        model(**batch_for(model))
    return calls


@pytest.mark.parametrize(
    ("variant", "select"),
    [pytest.param("top_k", top_2, id="top_k"), pytest.param("top_p", mass_above, id="top_p")],
)
@pytest.mark.parametrize("family", FFNS)
def test_site_is_the_gated_sum_of_whole_ffns(
    family: str, variant: Any, select: Callable[[Tensor], Tensor]
) -> None:
    config = molora.presets.mixlora(
        num_experts=4, rank=3, alpha=6, dropout=0.0, variant=variant, top_p=0.7
    )
    calls = calls_of_ffns(family, config)
    assert len(calls) == (4 if family.startswith("t5") else 2)
    expert_sets = set()
    for ffn, x_TD, y_TD in calls:
        naive_TD = expected(family, ffn, x_TD, scaling=2.0, select=select)
        torch.testing.assert_close(y_TD, naive_TD, rtol=1e-9, atol=1e-9)
        wrong_TD = expected(family, ffn, x_TD, scaling=2.0, select=lambda s: select(s).roll(1, 1))
        assert (y_TD - wrong_TD).abs().max() > 1e-2
        gates_TE = select(torch.softmax(x_TD @ ffn.router.weight.double().T, dim=-1))
        expert_sets |= {tuple(row.nonzero().flatten().tolist()) for row in gates_TE}
    assert len(expert_sets) > 1


@pytest.mark.parametrize("outside", [1, None], ids=["lora_on_up", "nothing_on_up"])
def test_a_projection_outside_the_group_has_its_own_experts_or_none(outside: int | None) -> None:
    """The LoRA of another group on up_proj is part of every FFN_e, once."""
    alpha = {"expert": {"kind": "lora", "alpha": 6}, "rank": 3}
    groups = [{"targets": ["gate_proj", "down_proj"], "site": {"kind": "ffn"}, "num_experts": 4}]
    if outside:
        groups.append({"targets": "up_proj", "num_experts": outside})
    config = MixtureConfig.parse({"groups": [group | alpha for group in groups]})
    calls = calls_of_ffns("llama", config)
    assert [hasattr(ffn.up_proj, "experts") for ffn, *_ in calls] == [bool(outside)] * 2
    for ffn, x_TD, y_TD in calls:
        naive_TD = expected("llama", ffn, x_TD, scaling=2.0, select=top_2)
        torch.testing.assert_close(y_TD, naive_TD, rtol=1e-9, atol=1e-9)


def test_projections_of_one_ffn_need_one_number_of_experts() -> None:
    groups = [
        {"targets": target, "site": {"kind": "ffn"}, "num_experts": count}
        for target, count in (("gate_proj", 4), ("up_proj", 3))
    ]
    with pytest.raises(molora.AttachError, match=r"\[3, 4\] experts.* need one number"):
        molora.attach(tiny("llama"), MixtureConfig.parse({"groups": groups}))


def test_ffn_site_refuses_a_linear_outside_of_an_ffn() -> None:
    config = molora.presets.mixlora(targets="q_proj", attention_targets=None)
    with pytest.raises(molora.AttachError, match=r"q_proj is not a projection of one.*'linear'"):
        molora.attach(tiny("llama"), config)

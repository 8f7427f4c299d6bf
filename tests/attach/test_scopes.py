"""Who shares a decision: a linear alone, the linears of a block, or of a layer."""

from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn

import molora
from molora.config import MixtureConfig

LAYERS = {
    "llama": "model.layers.{}",
    "phi3": "model.layers.{}",
    "gpt2": "transformer.h.{}",
    "roberta": "roberta.encoder.layer.{}",
    "gemma3": "model.layers.{}",
}
# family → blocks of a layer and the linears in each
BLOCKS: dict[str, dict[str, list[str]]] = {
    "llama": {
        "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "mlp": ["gate_proj", "up_proj", "down_proj"],
    },
    "phi3": {"self_attn": ["o_proj", "qkv_proj"], "mlp": ["gate_up_proj", "down_proj"]},
    "gpt2": {"attn": ["c_attn", "c_proj"], "mlp": ["c_fc", "c_proj"]},
    "roberta": {
        "attention.self": ["query", "key", "value"],
        "attention.output": ["dense"],
        "intermediate": ["dense"],
        "output": ["dense"],
    },
}
BLOCKS["gemma3"] = BLOCKS["llama"]


def expected_sites(family: str, scope: str) -> dict[str, set[str]]:
    """Site → paths of the linears that follow it."""
    sites: dict[str, set[str]] = {}
    for layer in (LAYERS[family].format(i) for i in range(2)):
        for block, linears in BLOCKS[family].items():
            for linear in linears:
                path = f"{layer}.{block}.{linear}"
                owner = {"linear": path, "block": f"{layer}.{block}", "layer": layer}[scope]
                sites.setdefault(owner, set()).add(path)
    return sites


def top_2(logits_TE: Tensor) -> Tensor:
    best = logits_TE.softmax(dim=-1).topk(2, dim=-1)
    gates = best.values / best.values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(logits_TE).scatter(1, best.indices, gates)


@pytest.mark.parametrize("scope", ["linear", "block", "layer"])
@pytest.mark.parametrize("family", BLOCKS)
def test_every_linear_follows_the_router_that_reads_its_scopes_input(
    family: str, scope: str
) -> None:
    model = tiny(family).double()
    group = {"num_experts": 3, "rank": 5, "site": {"kind": "linear", "scope": scope}}
    plain = {name: module.forward for name, module in model.named_modules()}
    mixture = molora.attach(model, MixtureConfig.parse({"groups": [group]}))
    randomize(mixture)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, y: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = y[0] if isinstance(y, tuple) else y
            seen[name] = x.flatten(0, 1), y.flatten(0, 1)

        return hook

    sites = expected_sites(family, scope)
    assert mixture.built.sites.keys() == sites.keys()
    routed_by = {path: owner for owner, paths in sites.items() for path in paths}
    assert mixture.built.routed_by == routed_by
    for name in sites.keys() | set().union(*sites.values()):
        model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
    with torch.no_grad(), mixture.record() as records:
        model(**batch_for(model))
    assert records.keys() == sites.keys()

    decisions = set()
    for owner, paths in sites.items():
        router = model.get_submodule(owner).router.weight.double()
        gates_TE = top_2(seen[owner][0] @ router.T)
        torch.testing.assert_close(records[owner].dense_gates(), gates_TE)
        decisions |= {tuple(row.nonzero().flatten().tolist()) for row in gates_TE}
        for path in paths:
            x_TD, y_TF = seen[path]
            bank = model.get_submodule(path).experts
            lora_A, lora_B = bank.lora_A.double(), bank.lora_B.double()
            with torch.no_grad():
                expected_TF = plain[path](x_TD)
                for e in range(3):
                    delta_TF = 16 / 5 * x_TD @ lora_A[e].T @ lora_B[e].T
                    expected_TF = expected_TF + gates_TE[:, e : e + 1] * delta_TF
            torch.testing.assert_close(y_TF, expected_TF, rtol=1e-6, atol=1e-6)
            assert (y_TF - plain[path](x_TD)).abs().max() > 1e-2
    assert len(decisions) > 1


def test_groups_of_different_scopes_live_side_by_side() -> None:
    model = tiny("llama")
    groups = [
        {"targets": ["q_proj", "k_proj"], "site": {"kind": "linear", "scope": "block"}},
        {"targets": "ffn", "site": {"kind": "ffn"}},
        {"targets": "v_proj"},
        {"targets": "o_proj", "num_experts": 1},
    ]
    config = MixtureConfig.parse({"groups": [{"num_experts": 3, "rank": 5} | g for g in groups]})
    mixture = molora.attach(model, config)
    randomize(mixture)
    layers = ("model.layers.0", "model.layers.1")
    assert mixture.built.sites.keys() == {
        f"{layer}.{owner}" for layer in layers for owner in ("self_attn", "mlp", "self_attn.v_proj")
    }
    assert mixture.built.routed_by["model.layers.1.self_attn.k_proj"] == "model.layers.1.self_attn"
    assert mixture.built.routed_by["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp"
    assert "model.layers.0.self_attn.o_proj" not in mixture.built.routed_by
    with mixture.record() as records:
        model.train()(**batch_for(model)).loss.backward()
    assert records.keys() == mixture.built.sites.keys()
    for parameters in mixture.trainable_parameters().values():
        assert all(p.grad.abs().max() > 0 for p in parameters)


def test_a_scope_called_with_something_else_than_hidden_states_says_so() -> None:
    """Linears that do not read the rows of their block cannot share its decision."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 7)
            self.last = nn.Linear(7, 5)

        def forward(self, x_BSD: Tensor) -> Tensor:
            return self.last(self.first(x_BSD).mean(dim=1))

    model = nn.Sequential(Pooled())
    group = {"targets": ["first", "last"], "site": {"kind": "linear", "scope": "block"}}
    molora.attach(model, MixtureConfig.parse({"groups": [group]}))
    with pytest.raises(molora.AttachError, match=r"rows of shape \(2,\) that are not the block's"):
        model(torch.randn(2, 4, 6))


def test_a_plain_module_carries_a_mixture_too() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    x = torch.randn(5, 6)
    base = model(x)
    config = molora.presets.mola(num_experts=3, rank=5, dropout=0.0, targets=["0", "2"])
    mixture = molora.attach(model, config)
    assert torch.equal(model(x), base)
    randomize(mixture)
    assert (model(x) - base).abs().max() > 1e-2
    # columns for the mixture never reach a base that has no such argument
    columns = {"task_types": torch.zeros(5, dtype=torch.long)}
    assert torch.equal(model(x, **columns), model(x))
    with mixture.disabled():
        assert torch.equal(model(x, **columns), base)
    with mixture.record() as records:
        model.train()(x).sum().backward()
    assert [r.grid for r in records.values()] == [(5,), (5,)]
    mixture.detach()
    assert torch.equal(model(x), base)

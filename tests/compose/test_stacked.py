"""Adapters of a base's stacked weights act as experts: against package peft and dense algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from frozen_sets import load_set, logits, save_set
from peft_adapters import edit_config, edit_tensors, save_adapter
from stacked_sets import (
    BOTH,
    DOWN,
    RAGGED,
    SAME,
    UP,
    close,
    compose,
    reference,
    same_everywhere,
)
from tiny_models import batch_for, tiny
from torch import Tensor, nn

import molora
from molora.compose.edit import edited, experts_of, saved_experts
from molora.errors import ConfigError

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", BOTH),
    "qwen": ("qwen3_moe", {**BOTH, "target_modules": ["q_proj", "down_proj"]}),
    "gate and up": ("mixtral", {**BOTH, "target_parameters": [UP]}),
    "down": ("qwen3_moe", {**BOTH, "target_parameters": [DOWN]}),
    "one layer": ("mixtral", {**BOTH, "target_parameters": [f"layers.1.{UP}"]}),
    "patterns": (
        "qwen3_moe",
        {**BOTH, "rank_pattern": {r".*\.gate_up_proj": 6}, "alpha_pattern": {"down_proj": 11}},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_at_gate_1_gives_what_peft_gives(tmp_path: Path, kind: str) -> None:
    family, settings = KINDS[kind]
    expected = logits(save_adapter(tmp_path / "math", family, **settings))
    experts = molora.load_experts({"math": tmp_path / "math"})
    base = logits(tiny(family))
    assert (base - expected).abs().max() > 1e-2
    for router in ({"kind": "fixed", "weights": {"math": 1.0}}, {"kind": "linear", "top_k": 1}):
        mixture = compose(family, experts, router)
        close(logits(mixture.model), expected)
        with mixture.disabled():
            assert torch.equal(logits(mixture.model), base)
        names = {name for name, _ in tiny(family).named_parameters()}
        mixture.detach()
        assert torch.equal(logits(mixture.model), base)
        assert {name for name, _ in mixture.model.named_parameters()} == names
        assert all("lora" not in name for name, _ in mixture.model.named_modules())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("settings", [SAME, RAGGED], ids=["alike", "ragged"])
@pytest.mark.parametrize("backend", ["auto", "grouped", "reference"])
def test_fixed_weights_are_the_weighted_sum_of_weights(
    tmp_path: Path, family: str, settings: dict[str, Any], backend: str
) -> None:
    experts = load_set(tmp_path, settings, family)
    weights = [0.75, -0.5, 1.25, 0.5][: len(experts.names)]
    router = {"kind": "fixed", "weights": dict(zip(experts.names, weights, strict=True))}
    mixture = compose(family, experts, router, missing="zero", backend=backend)
    ours = logits(mixture.model)
    close(ours, reference(experts, same_everywhere(*weights), family).detach())
    other = reference(experts, same_everywhere(*weights[::-1]), family).detach()
    assert (ours - other).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [SAME, RAGGED], ids=["alike", "ragged"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_every_token_has_the_gates_that_are_given(
    tmp_path: Path, settings: dict[str, Any], top_k: int | None
) -> None:
    experts = load_set(tmp_path, settings, "mixtral")
    mixture = compose("mixtral", experts, {"kind": "given", "top_k": top_k}, missing="zero")
    batch = batch_for(mixture.model, labels=False)
    gates_BSE = torch.rand(*batch["input_ids"].shape, len(experts.names))
    if top_k is not None:
        gates_BSE *= gates_BSE >= gates_BSE.topk(top_k).values[..., -1:]

    def gates(path: str, x: Tensor) -> Tensor:
        return gates_BSE.view(*x.shape[:-1], -1)

    with mixture.context(expert_gates=gates_BSE):
        ours = logits(mixture.model, **batch)
    close(ours, reference(experts, gates, **batch).detach())
    turned = reference(experts, lambda p, x: gates(p, x).flip(-1), **batch).detach()
    assert (ours - turned).abs().max() > 1e-2


@pytest.mark.parametrize("layerwise", [False, True])
def test_x_lora_decides_for_parameters_too(tmp_path: Path, layerwise: bool) -> None:
    experts = load_set(tmp_path, RAGGED, "mixtral")
    router = {"kind": "xlora", "layerwise": layerwise, "temperature": 0.1}
    mixture = compose("mixtral", experts, router, missing="zero")
    with mixture.record() as records:
        ours = logits(mixture.model)
    assert len(records) == (len([*experts.modules, *experts.parameters]) if layerwise else 1)

    def gates(path: str, x: Tensor) -> Tensor:
        record: Any = records[path if layerwise else "model"]
        return record.dense_gates().view(*x.shape[:-1], -1)

    close(ours, reference(experts, gates).detach())
    if layerwise:
        first: Any = records[experts.parameters[0]]
        other: Any = records[experts.parameters[1]]
        assert (first.gates - other.gates).abs().max() > 1e-3


@pytest.mark.parametrize("scope", ["linear", "block", "layer"])
def test_one_decision_serves_both_parameters_of_a_module(tmp_path: Path, scope: str) -> None:
    mixture = compose(
        "mixtral", load_set(tmp_path, SAME, "mixtral"), {"kind": "linear", "scope": scope}
    )
    block = "model.layers.0" if scope == "layer" else "model.layers.0.mlp.experts"
    routed = mixture.built.routed_by
    assert routed[f"model.layers.0.{UP}"] == routed[f"model.layers.0.{DOWN}"] == block
    with mixture.record() as records:
        logits(mixture.model)
    assert len(records) == 2
    assert not isinstance(records[block], list)


# ------------------------------------------------------------------- experts that lack parameters


@pytest.mark.parametrize("missing", ["zero", "mask", "renorm"])
def test_an_expert_that_lacks_a_parameter_follows_the_policy(tmp_path: Path, missing: Any) -> None:
    # "art" has no stacked weights, "law" has them at down_proj alone
    experts = load_set(tmp_path, RAGGED, "mixtral")
    router = {"kind": "linear", "top_k": "all"}
    mixture = compose("mixtral", experts, router, missing=missing)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if name.endswith("router.weight"):
                parameter.normal_(std=0.3)
    weights = {n: p.detach() for n, p in mixture.named_parameters() if n.endswith("router.weight")}

    def has(path: str) -> Tensor:
        every = experts.adapters.values()
        return torch.tensor([path in a.modules or path in a.parameters for a in every])

    def gates(path: str, x: Tensor) -> Tensor:
        stacked = path in experts.parameters
        owner = path.rpartition(".")[0] if stacked else path
        logits_TE = x @ weights[f"{owner}.router.weight"].to(x).T
        own_E = has(path)
        if missing == "mask":  # of a module's one router: who has either parameter
            either_E = (
                has(f"{owner}.gate_up_proj") | has(f"{owner}.down_proj") if stacked else own_E
            )
            return logits_TE.masked_fill(~either_E, -torch.inf).softmax(-1)
        gates_TE = logits_TE.softmax(-1)
        if missing == "renorm":
            gates_TE = gates_TE * own_E
            return gates_TE / gates_TE.sum(-1, keepdim=True)
        return gates_TE

    close(logits(mixture.model), reference(experts, gates).detach())


def test_missing_error_names_the_parameter(tmp_path: Path) -> None:
    settings = {"math": SAME["math"], "law": {**BOTH, "target_parameters": [DOWN]}}
    experts = load_set(tmp_path, settings, "mixtral")
    with pytest.raises(ConfigError, match=r"expert law does not adapt .*gate_up_proj and 1 more"):
        compose("mixtral", experts, "uniform", missing="error")


# ------------------------------------------------------------------------------ saving and editing


@pytest.mark.parametrize("settings", [SAME, RAGGED], ids=["alike", "ragged"])
def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    experts = load_set(tmp_path, settings, "mixtral")
    mixture = compose("mixtral", experts, {"kind": "linear", "top_k": 2}, seed=3)
    expected = logits(mixture.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in mixture.state_dict().items()}
    path = f"model.layers.0.{UP}"
    # (E · E_b, rank, in), "math" of rank 3 and "code" of rank 2 in blocks of their own
    assert shapes[f"{path}.experts.lora_A"] == ((12 if settings is SAME else 4), 3, 32)
    assert settings is SAME or shapes[f"{path}.experts.1.lora_B"] == (4, 80, 2)
    mixture.save(tmp_path / "saved")
    again = molora.load(tiny("mixtral"), tmp_path / "saved")
    assert torch.equal(logits(again.model), expected)
    for found in (experts_of(again), saved_experts(tmp_path / "saved")):
        for name, adapter in experts.adapters.items():
            other = found.adapters[name]
            assert other.parameters.keys() == adapter.parameters.keys()
            assert other.modules.keys() == adapter.modules.keys()
            for key, parameter in adapter.parameters.items():
                assert torch.equal(other.parameters[key].lora_A, parameter.lora_A)
                assert torch.equal(other.parameters[key].lora_B, parameter.lora_B)
                assert other.parameters[key].scaling == parameter.scaling


def test_an_expert_goes_and_another_comes(tmp_path: Path) -> None:
    experts = load_set(tmp_path, RAGGED, "mixtral")
    mixture = compose("mixtral", experts, "uniform", missing="zero")
    added = {"new": save_set(tmp_path / "more", {"x": SAME["law"]}, "mixtral")["x"]}
    weights = {"code": 0.5, "law": 0.25, "art": 0.5, "new": 1.0}
    made = edited(
        mixture,
        add=molora.load_experts(added),
        drop=["math"],
        router={"kind": "fixed", "weights": weights},
    )
    both = experts_of(made)
    assert both.names == tuple(weights)
    close(logits(made.model), reference(both, same_everywhere(*weights.values())).detach())


def _gpt_oss() -> Any:
    """Weights (E, in, out) with biases, and halves that lie between each other."""
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def test_weights_that_lie_the_other_way_give_what_peft_gives(tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": [UP, DOWN]}
    theirs: Any = peft.get_peft_model(_gpt_oss(), peft.LoraConfig(**settings)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "math")
    expected = logits(theirs)
    model = _gpt_oss()
    base = logits(model)
    assert (base - expected).abs().max() > 1e-2
    experts = molora.load_experts({"math": tmp_path / "math"})
    molora.compose(model, experts, router={"kind": "fixed", "weights": {"math": 1.0}})
    close(logits(model), expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_however_the_base_computes_its_experts(tmp_path: Path, implementation: str) -> None:
    experts = load_set(tmp_path, SAME, "qwen3_moe")
    model: Any = tiny("qwen3_moe")
    model.set_experts_implementation(implementation)
    base = logits(model)
    mixture = molora.compose(model, experts, router="uniform")
    third = same_everywhere(1 / 3, 1 / 3, 1 / 3)
    close(logits(model), reference(experts, third, "qwen3_moe").detach())
    with mixture.disabled():
        assert torch.equal(logits(model), base)


def test_activated_experts_of_linears_go_with_others_of_stacked_weights(tmp_path: Path) -> None:
    settings = {
        "math": SAME["math"],
        "code": {"target_modules": ["q_proj"], "alora_invocation_tokens": [7, 9]},
    }
    experts = load_set(tmp_path, settings, "mixtral")
    router = {"kind": "fixed", "weights": {"math": 0.5, "code": 1.0}}
    mixture = compose("mixtral", experts, router, missing="zero")
    ids = torch.tensor([[5, 7, 9, 11, 12], [4, 5, 6, 8, 10]])
    acting_BSE = torch.tensor([0.5, 1.0]).repeat(2, 5, 1)
    acting_BSE[0, :1, 1] = 0  # before the tokens
    acting_BSE[1, :, 1] = 0  # no such tokens

    def gates(path: str, x: Tensor) -> Tensor:
        return acting_BSE.view(*x.shape[:-1], -1)

    ours = logits(mixture.model, input_ids=ids)
    close(ours, reference(experts, gates, input_ids=ids).detach())
    always = reference(experts, same_everywhere(0.5, 1.0), input_ids=ids).detach()
    assert (ours - always).abs().max() > 1e-2


def _save_single(directory: Path, experts: molora.FrozenExperts, name: str) -> None:
    """An adapter as transformers 4 had it, each expert's halves by themselves, with the same update
    of stacked weights; A is the same for both halves."""
    adapter, tensors = experts.adapters[name], dict[str, Tensor]()
    for path, part in adapter.parameters.items():
        block = path.rpartition(".experts.")[0].replace(".mlp", ".block_sparse_moe")
        leaves = ("w1", "w3") if path.endswith("gate_up_proj") else ("w2",)
        for j in range(part.num_experts):
            for leaf, half in zip(leaves, part.lora_B[j].chunk(len(leaves)), strict=True):
                key = f"base_model.model.{block}.experts.{j}.{leaf}"
                tensors[f"{key}.lora_A.weight"] = part.lora_A[j]
                tensors[f"{key}.lora_B.weight"] = half
    save_adapter(directory, "mixtral", r=3, lora_alpha=8, target_modules=["q_proj"])
    edit_tensors(directory, lambda t: (t.clear(), t.update(tensors)))
    edit_config(directory, target_modules=["w1", "w2", "w3"])


def test_adapters_of_single_experts_act_on_the_stack_that_is_in_their_place(tmp_path: Path) -> None:
    stacked = load_set(tmp_path, {"math": SAME["math"], "code": SAME["code"]}, "mixtral")
    _save_single(tmp_path / "single", stacked, "code")
    mixed = molora.load_experts({"math": tmp_path / "math", "code": tmp_path / "single"})
    assert len(mixed.adapters["code"].modules) == 2 * 4 * 3
    router = {"kind": "fixed", "weights": {"math": 0.5, "code": 0.75}}
    with pytest.warns(UserWarning, match="code: factors of single experts were stacked"):
        mixture = compose("mixtral", mixed, router)
    close(logits(mixture.model), reference(stacked, same_everywhere(0.5, 0.75)).detach())
    mixture.save(tmp_path / "saved")
    again = molora.load(tiny("mixtral"), tmp_path / "saved")
    assert torch.equal(logits(again.model), logits(mixture.model))
    again.detach()
    plain = compose(
        "mixtral", load_set(tmp_path / "plain", {"math": SAME["math"]}, "mixtral"), "uniform"
    )
    more = molora.load_experts({"code": tmp_path / "single"})
    made = edited(plain, add=more, router=router)
    close(logits(made.model), reference(stacked, same_everywhere(0.5, 0.75)).detach())


def test_records_know_sequences_and_padding_while_decoding_too(tmp_path: Path) -> None:
    mixture = compose(
        "mixtral", load_set(tmp_path, SAME, "mixtral"), {"kind": "linear", "top_k": 2}
    )
    batch = batch_for(mixture.model, (4, 6), labels=False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model: Any = mixture.model
    with torch.no_grad(), mixture.record() as records:
        first = model(input_ids=ids[:, :3], attention_mask=mask[:, :3], use_cache=True)
        cache = first.past_key_values
        model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache)
    found: Any = records["model.layers.1.mlp.experts"]
    assert [record.grid for record in found] == [(2, 3), (2, 3)]
    assert found[0].mask.tolist() == [True] * 6
    assert found[1].mask.tolist() == mask[:, 3:].flatten().bool().tolist()
    assert not found[1].mask.all()

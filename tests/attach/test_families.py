"""The life of a mixture on every family: match, forward, backward, step, save, load, generate,
detach."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CLASSIFIERS, FAMILIES, batch_for, randomize, tiny
from torch import Tensor, nn

import molora
from molora.config import MixtureConfig

EXPERTS = {"num_experts": 3, "rank": 5}
LINEAR = molora.presets.mola(**EXPERTS, top_k=2, dropout=0.0)
FFN = molora.presets.mixlora(**EXPERTS, top_k=2, dropout=0.0)
MOE_BASES = ["mixtral", "qwen3_moe"]
WITHOUT_FFN_SITE = [*CLASSIFIERS, *MOE_BASES]
CASES = [pytest.param(family, LINEAR, id=f"{family}-linear") for family in FAMILIES] + [
    pytest.param(family, FFN, id=f"{family}-ffn")
    for family in FAMILIES
    if family not in WITHOUT_FFN_SITE
]

QKVO = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}
GATED = {"gate_proj": 2, "up_proj": 2, "down_proj": 2}
LLAMA_LIKE = (QKVO, GATED)
BERT_LIKE = (
    {"self.query": 2, "self.key": 2, "self.value": 2, "attention.output.dense": 2},
    {"intermediate.dense": 2, "output.dense": 2},
)
T5_ATTENTION = {
    f"{block}.{name}": count
    for block, count in (("SelfAttention", 4), ("EncDecAttention", 2))
    for name in "qkvo"
}
# family → what `attention` and what `ffn` match: suffix → number of linears
MATCHES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3": LLAMA_LIKE,
    "phi3": ({"qkv_proj": 2, "o_proj": 2}, {"gate_up_proj": 2, "down_proj": 2}),
    "gpt2": ({"attn.c_attn": 2, "attn.c_proj": 2}, {"mlp.c_fc": 2, "mlp.c_proj": 2}),
    "bert": BERT_LIKE,
    "roberta": BERT_LIKE,
    "t5": (T5_ATTENTION, {"wi": 4, "wo": 4}),
    "t5_gated": (T5_ATTENTION, {"wi_0": 4, "wi_1": 4, "wo": 4}),
    "mixtral": (QKVO, {}),
    "qwen3_moe": (QKVO, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_match_exactly_the_linears_of_the_layers(family: str) -> None:
    attention, ffn = MATCHES[family]
    with torch.device("meta"):
        model = tiny(family)
    found = {}
    for pattern, suffixes in (("attention", attention), ("ffn", ffn), ("all", attention | ffn)):
        if not suffixes:
            continue
        (match,) = molora.attach(model, _one_expert(pattern)).plan.matches
        found[pattern] = set(match.paths)
        assert _by_suffix(match.paths, suffixes) == suffixes
        model = _meta(family)
    assert found["all"] == found["attention"] | found.get("ffn", set())


@pytest.mark.parametrize(("family", "config"), CASES)
def test_life_of_a_mixture(family: str, config: MixtureConfig, tmp_path: Path) -> None:
    model = tiny(family)
    flags = {
        name: p.requires_grad_(i % 3 != 0).requires_grad
        for i, (name, p) in enumerate(model.named_parameters())
    }
    weights, modules = weights_hash(model), [name for name, _ in model.named_modules()]
    batch = batch_for(model)
    base = _logits(model, batch)

    mixture = molora.attach(model, config, seed=1)
    at_start = _logits(model, batch)
    assert torch.equal(at_start, base) or (config is FFN and _close(at_start, base))
    randomize(mixture)
    adapted = _logits(model, batch)
    assert (adapted - base).abs().max() > 1e-2

    model.train()
    optimiser = torch.optim.AdamW(mixture.parameter_groups(3e-4))
    first = _step(model, batch, optimiser)
    assert _step(model, batch, optimiser) < first
    model.eval()

    trained = _logits(model, batch)
    mixture.save(tmp_path / "mixture")
    fresh = tiny(family)
    molora.load(fresh, tmp_path / "mixture")
    assert torch.equal(_logits(fresh, batch), trained)
    assert not torch.equal(trained, adapted)

    if family not in CLASSIFIERS:
        prompt = {name: batch_for(model, side="left")[name] for name in batch if name != "labels"}
        written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        with mixture.disabled():
            assert not torch.equal(
                written, model.generate(**prompt, max_new_tokens=4, do_sample=False)
            )

    mixture.detach()
    assert torch.equal(_logits(model, batch), base)
    assert weights_hash(model) == weights
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [name for name, _ in model.named_modules()] == modules
    assert _leftovers(model, tiny(family)) == []


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_encoders_have_no_ffn_site_and_are_told_why(family: str) -> None:
    with pytest.raises(molora.AttachError, match=r"BERT and RoBERTa split the FFN over two"):
        molora.attach(tiny(family), FFN)


@pytest.mark.parametrize("family", MOE_BASES)
@pytest.mark.parametrize("target", ["ffn", "gate_proj", "experts"])
def test_fused_experts_of_a_base_are_named_as_untouched(family: str, target: str) -> None:
    with pytest.raises(
        molora.AttachError,
        match=rf"targets='{target}' matches no linear.*fused 3-D parameters "
        r"\(model\.layers\.0\.mlp\.experts\.gate_up_proj \(4, .*leaves untouched",
    ):
        molora.attach(tiny(family), _one_expert(target))


def test_all_leaves_the_routers_of_a_moe_base_alone_and_the_plan_names_its_experts() -> None:
    model = tiny("qwen3_moe")
    plan = molora.attach(model, LINEAR).plan
    assert len(plan.untouched) == 4
    assert all("mlp.experts." in name for name in plan.untouched)
    assert not [p.path for p in plan.placements if "mlp" in p.path]


def weights_hash(model: nn.Module) -> str:
    """Hash of every base parameter and buffer, experts and routers left out."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".experts.lora_" not in name and ".router." not in name:
            digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def _meta(family: str) -> nn.Module:
    with torch.device("meta"):
        return tiny(family)


def _one_expert(target: str) -> MixtureConfig:
    return molora.presets.lora(rank=3, targets=target)


def _by_suffix(paths: tuple[str, ...], suffixes: dict[str, int]) -> dict[str, int]:
    """Paths counted by the longest suffix that fits; a path that fits none counts for itself."""
    ordered = sorted(suffixes, key=len, reverse=True)
    return dict(
        Counter(next((s for s in ordered if path.endswith(f".{s}")), path) for path in paths)
    )


@torch.no_grad()  # with gradients, torch takes another attention kernel
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits


def _step(model: nn.Module, batch: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> float:
    loss = model(**batch).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    return float(loss.detach())


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5)


def _leftovers(model: nn.Module, untouched: nn.Module) -> list[str]:
    """What differs between the instance attributes of a detached model and of one never adapted."""
    faults = []
    reference = dict(untouched.named_modules())
    for name, module in model.named_modules():
        own, other = vars(module), vars(reference[name])
        faults += [f"{name}.{key}" for key in own.keys() ^ other.keys()]
        for key in (k for k in own if k.endswith("_hooks")):
            values: tuple[Any, Any] = own[key], other[key]
            faults += [f"{name}.{key}"] if values[0] and len(values[0]) != len(values[1]) else []
    return faults

"""Frozen experts on a model: what package peft and dense algebra compute, and nothing changed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from frozen_sets import PLAIN, RAGGED, by_hand, constant, load_set, logits, save_set
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import ArrowConfig
from peft_adapters import edit_tensors, save_adapter
from saved_mixtures import Snapshot
from tiny_models import batch_for, tiny
from torch import nn

import molora
from molora.errors import AttachError, ConfigError

ARROW = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
    "qwen3": {"target_modules": ["k_proj", "o_proj", "up_proj"]},
    "t5": {"target_modules": ["q", "wo"]},
}


@pytest.mark.parametrize("family", ARROW)
def test_arrow_is_that_of_peft_with_exact_prototypes(tmp_path: Path, family: str) -> None:
    dirs = save_set(tmp_path, dict.fromkeys(PLAIN, ARROW[family]), family)
    model = tiny(family)
    mixture = molora.compose(
        model, molora.load_experts(dirs), router={"kind": "arrow", "top_k": 2, "temperature": 0.7}
    )
    ours = logits(model)

    config = ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=0)
    paths = [str(path) for path in dirs.values()]
    theirs = peft.create_arrow_model(
        tiny(family), task_specific_adapter_paths=paths, arrow_config=config
    ).eval()
    batch = batch_for(model, labels=False)
    with torch.no_grad():
        powers = theirs(**batch).logits  # 15 steps of the power iteration
        for name, layer in theirs.named_modules():
            if isinstance(layer, LoraLayer):
                site = mixture.built.sites[name.removeprefix("base_model.model.")]
                arrow = layer.lora_arrow["arrow_router"]
                assert arrow.prototypes.shape == site.router.weight.shape
                arrow.prototypes.copy_(site.router.weight)
        exact = theirs(**batch).logits
    torch.testing.assert_close(ours, exact, atol=2e-5, rtol=2e-5)
    assert (powers - exact).abs().max() > 1e-3


def test_the_direction_of_an_expert_is_its_first_right_singular_vector(tmp_path: Path) -> None:
    experts = load_set(tmp_path, RAGGED)
    mixture = molora.compose(tiny("llama"), experts, router="arrow")
    for path, site in mixture.built.sites.items():
        for number, adapter in enumerate(experts.adapters.values()):
            found_D = site.router.weight[number]
            if path not in adapter.modules:
                assert not found_D.any()
                continue
            module = adapter.modules[path]
            _, _, Vh = torch.linalg.svd(module.lora_B.double() @ module.lora_A.double())
            assert abs(float(Vh[0] @ found_D.double())) == pytest.approx(1, abs=1e-6)
            assert abs(float(Vh[1] @ found_D.double())) < 1e-5


def test_fixed_weights_are_those_of_an_exact_merge_by_peft(tmp_path: Path) -> None:
    dirs = save_set(tmp_path, {name: {"target_modules": ["q_proj", "down_proj"]} for name in PLAIN})
    weights = {"math": 0.7, "code": -0.4, "law": 1.3}
    model = tiny("llama")
    molora.compose(model, molora.load_experts(dirs), router={"kind": "fixed", "weights": weights})
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(dirs["math"]), adapter_name="math")
    for name in ("code", "law"):
        theirs.load_adapter(str(dirs[name]), adapter_name=name)
    theirs.add_weighted_adapter(
        [*weights], [*weights.values()], adapter_name="all", combination_type="cat"
    )
    theirs.set_adapter("all")
    expected = logits(theirs.eval().get_base_model())
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=2e-5)
    theirs.set_adapter("math")
    assert (logits(theirs.get_base_model()) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [PLAIN, RAGGED], ids=["plain", "ragged"])
def test_fixed_weights_add_up_what_each_adapter_alone_adds(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    dirs = save_set(tmp_path, settings)
    experts = molora.load_experts(dirs)
    weights = dict(zip(dirs, (0.5, -1.0, 2.0, 0.25), strict=False))
    model = tiny("llama")
    molora.compose(model, experts, router={"kind": "fixed", "weights": weights})
    for path in experts.modules:
        linear = model.get_submodule(path)
        x = torch.randn(5, linear.in_features)
        base = tiny("llama").get_submodule(path)(x)
        expected = base.clone()
        for name, directory in dirs.items():
            alone = peft.PeftModel.from_pretrained(tiny("llama"), str(directory)).eval()
            layer = alone.get_base_model().get_submodule(path)
            expected += weights[name] * (layer(x) - base)
        torch.testing.assert_close(linear(x), expected, atol=2e-5, rtol=2e-5)
        assert (expected - base).abs().max() > 1e-2


@pytest.mark.parametrize("name", RAGGED)
def test_one_expert_of_unlike_ones_alone_is_that_adapter(tmp_path: Path, name: str) -> None:
    dirs = save_set(tmp_path, RAGGED)
    model = tiny("llama")
    weights = {other: float(other == name) for other in dirs}
    molora.compose(model, molora.load_experts(dirs), router={"kind": "fixed", "weights": weights})
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(dirs[name])).eval()
    expected = logits(theirs.get_base_model())
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=2e-5)
    assert (logits(tiny("llama")) - expected).abs().max() > 1e-2


def test_the_mean_of_all_is_uniform(tmp_path: Path) -> None:
    experts = load_set(tmp_path, RAGGED)
    model = tiny("llama")
    molora.compose(model, experts, router="uniform")
    expected = by_hand(experts, constant(0.25, 0.25, 0.25, 0.25))
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=2e-5)
    wrong = by_hand(experts, constant(0.25, 0.25, 0.5, 0.25))
    assert (wrong - expected).abs().max() > 1e-3


def test_base_files_and_factors_are_left_as_they_were(tmp_path: Path) -> None:
    dirs = save_set(tmp_path, RAGGED)
    experts = molora.load_experts(dirs)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    factors = {
        (name, path): (module.lora_A.clone(), module.lora_B.clone())
        for name, adapter in experts.adapters.items()
        for path, module in adapter.modules.items()
    }
    model = tiny("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    before, base = Snapshot.of(model), logits(model)
    mixture = molora.compose(model, experts, router="linear", trainable=["math"], new=["more"])
    optimiser = torch.optim.SGD(mixture.parameter_groups(0.5))
    model.train()(**batch_for(model)).loss.backward()
    optimiser.step()
    assert (logits(model.eval()) - base).abs().max() > 1e-2
    with mixture.disabled():
        assert torch.equal(logits(model), base)
    mixture.detach()
    before.assert_same(model)
    assert torch.equal(logits(model), base)
    assert {path: path.read_bytes() for path in files} == files
    for (name, path), (lora_A, lora_B) in factors.items():
        module = experts.adapters[name].modules[path]
        assert torch.equal(module.lora_A, lora_A)
        assert torch.equal(module.lora_B, lora_B)


def test_experts_that_name_another_base_are_pointed_out(tmp_path: Path) -> None:
    from peft_adapters import edit_config

    dirs = save_set(tmp_path)
    edit_config(dirs["code"], base_model_name_or_path="owner/other-7b")
    model = tiny("llama")
    model.config._name_or_path = "owner/llama-7b"
    with pytest.warns(UserWarning, match="code: trained on 'owner/other-7b', but the base is"):
        molora.compose(model, molora.load_experts(dirs))


# ------------------------------------------------------------------ refusals

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown router": ({"router": "arow"}, "router: unknown kind 'arow'.*arrow"),
    "an unknown argument": (
        {"router": {"kind": "arrow", "topk": 2}},
        "router arrow: unknown argument 'topk'.*top_k",
    ),
    "too many chosen": ({"router": {"kind": "arrow", "top_k": 4}}, "top_k=4 exceeds num_experts=3"),
    "none chosen": ({"router": {"kind": "arrow", "top_k": 0}}, "k"),
    "a weight that lacks": (
        {"router": {"kind": "fixed", "weights": {"math": 1.0, "law": 2.0}}},
        "no value for code",
    ),
    "a weight of nobody": (
        {"router": {"kind": "fixed", "weights": {"maths": 1.0}}},
        "unknown expert 'maths'.*math",
    ),
    "no weights": ({"router": "fixed"}, "router fixed needs 'weights'"),
    "arrow over trained experts": ({"trainable": ["math"]}, "router arrow is made from"),
    "spectr over new experts": ({"router": "spectr", "new": ["more"]}, "router spectr is made"),
    "an unknown trainable": ({"router": "linear", "trainable": ["x"]}, "trainable: unknown expert"),
    "a new one with an old name": ({"router": "linear", "new": ["law"]}, "cannot be called 'law'"),
    "a new one with a path": ({"router": "linear", "new": ["a/b"]}, "cannot be called 'a/b'"),
    "a new one of rank 0": (
        {"router": "linear", "new": {"more": {"rank": 0}}},
        "new.more: rank=0",
    ),
    "a new one of an endless scale": (
        {"router": "linear", "new": {"more": {"alpha": float("inf")}}},
        "new.more: rank=8, alpha=inf",
    ),
    "a setting that no new one has": (
        {"router": "linear", "new": {"more": {"ranks": 3}}},
        "new.more: unknown setting 'ranks'",
    ),
    "vectors that lack": ({"router": "phatgoose"}, "needs `vectors`"),
    "vectors for none": ({"router": {"kind": "arrow", "vectors": {}}}, "takes none"),
    "vectors by another name": ({"router": {"kind": "linear", "vectors": "arow"}}, "'arow'"),
    "vectors of linears for a layer": (
        {"router": {"kind": "linear", "scope": "layer", "vectors": "arrow"}},
        "scope",
    ),
    "an unknown policy": ({"missing": "drop"}, "missing"),
    "a field of no mixture": ({"dtyp": "bfloat16"}, "dtyp"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_leaves_the_model(tmp_path: Path, mistake: str) -> None:
    given, message = MISTAKES[mistake]
    experts = load_set(tmp_path)
    model = tiny("llama")
    before = Snapshot.of(model)
    with pytest.raises(ConfigError, match=message):
        molora.compose(model, experts, **given)
    before.assert_same(model)


VECTORS = {
    "of another size": (lambda v: v["code"].update({PATH: torch.ones(7)}), r"shape \(7,\).*'code'"),
    "of two dimensions": (lambda v: v["law"].update({PATH: torch.ones(1, 32)}), r"\(1, 32\)"),
    "of no expert": (lambda v: v.pop("math"), "none for expert 'math'"),
    "of no linear": (lambda v: v["law"].pop(PATH), "none for expert 'law' at {PATH}"),
    "that are no numbers": (
        lambda v: v["law"].update({PATH: torch.full((32,), torch.nan)}),
        "NaN or infinity",
    ),
    "of a stranger": (lambda v: v.update(stranger=v["law"]), "unknown expert 'stranger'"),
}
PATH = "model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize("fault", VECTORS)
@pytest.mark.parametrize("kind", ["phatgoose", "linear"])
def test_vectors_that_do_not_fit_are_named(tmp_path: Path, fault: str, kind: str) -> None:
    edit, message = VECTORS[fault]
    experts = load_set(tmp_path)
    model = tiny("llama")
    before = Snapshot.of(model)
    vectors = {
        name: {path: torch.randn(m.lora_A.shape[1]) for path, m in adapter.modules.items()}
        for name, adapter in experts.adapters.items()
    }
    edit(vectors)
    with pytest.raises(ConfigError, match=message.format(PATH=PATH)):
        molora.compose(model, experts, router={"kind": kind, "vectors": vectors})
    before.assert_same(model)


def test_experts_for_linears_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    experts = load_set(tmp_path)
    model = tiny("gpt2")
    before = Snapshot.of(model)
    with pytest.raises(AttachError, match="q_proj, which this model has not"):
        molora.compose(model, experts)
    before.assert_same(model)


@pytest.mark.parametrize("hidden", [48, 16])
def test_shapes_are_compared_before_the_model_is_touched(
    tmp_path: Path, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(tmp_path / "math")
    experts = molora.load_experts({"math": tmp_path / "math"})
    model = tiny("llama", hidden_size=hidden)
    before = Snapshot.of(model)
    touched: list[str] = []
    monkeypatch.setattr(nn.Module, "add_module", lambda self, name, child: touched.append(name))
    message = (
        rf"math maps 32 to 48 features at model.layers.0.self_attn.q_proj.* maps {hidden} to 48"
    )
    with pytest.raises(AttachError, match=message):
        molora.compose(model, experts)
    assert not touched
    monkeypatch.undo()
    before.assert_same(model)


def test_a_second_mixture_and_a_peft_model_are_refused(tmp_path: Path) -> None:
    experts = load_set(tmp_path)
    model = tiny("llama")
    molora.compose(model, experts)
    with pytest.raises(AttachError, match="has a mixture already"):
        molora.compose(model, experts)
    with pytest.raises(AttachError, match="PEFT model"):
        molora.compose(save_adapter(tmp_path / "other"), experts)


def test_an_update_that_outweighs_its_weight_is_pointed_out(tmp_path: Path) -> None:
    for number, name in enumerate(("usual", "huge")):
        save_adapter(tmp_path / name, seed=number, r=2)
    edit_tensors(
        tmp_path / "usual", lambda tensors: [tensors[n].mul_(0.01) for n in tensors if "_B" in n]
    )
    edit_tensors(
        tmp_path / "huge", lambda tensors: [tensors[n].mul_(30) for n in tensors if "_B" in n]
    )
    with pytest.warns(UserWarning, match=r"huge: the update is up to .* as large as the weight"):
        molora.compose(tiny("llama"), molora.load_experts({"huge": tmp_path / "huge"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        molora.compose(tiny("llama"), molora.load_experts({"usual": tmp_path / "usual"}))

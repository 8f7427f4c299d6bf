"""Factors of stacked weights: ΔW of every one of them is what package peft adds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft_adapters import CONFIG, edit_config, edit_tensors, save_adapter
from tiny_models import batch_for, tiny
from torch import Tensor, nn

from molora.errors import CheckpointError, ConfigError
from molora.io.adapter import Adapter, ExpertParameter
from molora.io.peft_adapter import read_adapter
from molora.io.peft_fused import fused_experts

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"]}),
    "both": ("qwen3_moe", {"target_parameters": BOTH}),
    "both turned": ("mixtral", {"target_parameters": BOTH[::-1]}),
    "last parts": ("mixtral", {"target_parameters": ["down_proj", "gate_up_proj"]}),
    "router": ("mixtral", {"target_parameters": ["gate.weight", "mlp.experts.gate_up_proj"]}),
    "with modules": ("mixtral", {"target_parameters": BOTH, "target_modules": ["q_proj"]}),
    "patterns": (
        "qwen3_moe",
        {
            "target_parameters": BOTH,
            "rank_pattern": {r".*\.gate_up_proj": 6, r"layers\.1\.mlp\.experts\.down_proj": 2},
            "alpha_pattern": {"down_proj": 11},
            "use_rslora": True,
        },
    ),
    "layer": ("mixtral", {"target_parameters": ["layers.1.mlp.experts.down_proj"]}),
}


def _save(directory: Path, kind: str) -> nn.Module:
    family, settings = KINDS[kind]
    return save_adapter(directory, family, **{"target_modules": [], **settings})


def _added(parameter: ExpertParameter) -> Tensor:
    return parameter.scaling * torch.einsum("eor,eri->eoi", parameter.lora_B, parameter.lora_A)


def _wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ParamWrapper):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{path}.{layer.parameter_name}"] = layer
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_gets_what_peft_adds(tmp_path: Path, kind: str) -> None:
    wrappers = _wrappers(_save(tmp_path, kind))
    adapter = read_adapter(tmp_path)
    assert set(adapter.parameters) == set(wrappers)
    assert bool(adapter.modules) == (kind == "with modules")
    for name, wrapper in wrappers.items():
        parameter, expected = adapter.parameters[name], wrapper.get_delta_weight("default")
        assert parameter.rank == wrapper.r["default"]
        assert parameter.num_experts == (4 if "experts" in name else 1)
        ours = _added(parameter)
        torch.testing.assert_close(ours.reshape(expected.shape), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(parameter.update_norm), expected.norm())
        if parameter.num_experts > 1:  # B read as A lies is another, plausible update
            wrong = parameter.lora_B.movedim(0, 2).reshape(expected.shape[1], 4, -1).movedim(1, 0)
            wrong = parameter.scaling * torch.einsum("eor,eri->eoi", wrong, parameter.lora_A)
            assert (wrong - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("kind", ["both", "router", "with modules"])
def test_the_whole_model_gives_what_peft_gives(tmp_path: Path, kind: str) -> None:
    theirs = _save(tmp_path, kind)
    model = tiny(KINDS[kind][0])
    batch = batch_for(model, labels=False)
    with torch.no_grad():
        expected, base = theirs(**batch).logits, model(**batch).logits
        _merge(read_adapter(tmp_path), model)
        ours = model(**batch).logits
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=5e-5)
    assert (base - expected).abs().max() > 1e-2


def _merge(adapter: Adapter, model: nn.Module) -> None:
    for name, parameter in adapter.parameters.items():
        weight = model.get_parameter(name)
        weight += _added(parameter).reshape(weight.shape)
    for name, module in adapter.modules.items():
        weight = model.get_parameter(f"{name}.weight")
        weight += module.scaling * module.lora_B @ module.lora_A


def test_views_of_the_file_are_no_copies(tmp_path: Path) -> None:
    _save(tmp_path, "both")
    for parameter in read_adapter(tmp_path).parameters.values():
        for factor in (parameter.lora_A, parameter.lora_B):
            assert factor.untyped_storage().nbytes() >= factor.nbytes
            assert factor._base is not None


REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], dict[str, Any], str]] = {
    "names only one of two": (
        "both",
        lambda t: None,
        {"target_parameters": ["mlp.experts.down_proj"]},
        "has factors of 2 parameters of .* name \\['down_proj'\\] there",
    ),
    "an order that is not known": (
        "both",
        lambda t: None,
        {"target_parameters": ["mlp.experts.w1", "mlp.experts.w2"]},
        "Which factors are whose is known",
    ),
    "a level is missing": (
        "both",
        lambda t: [t.pop(n) for n in list(t) if "base_layer" not in n and "layers.0" in n],
        {},
        "has no factors of model.layers.0.mlp.experts, or",
    ),
    "no parameters named": ("one", lambda t: None, {"target_parameters": None}, "has rank 12"),
    "another rank": ("one", lambda t: None, {"r": 5}, "with the rank 5 of adapter_config"),
    "rank above the cap": ("one", lambda t: None, {"r": 513}, "which may be 512"),
    "a row less": (
        "one",
        lambda t: t.update({n: t[n][1:] for n in t if "lora_A" in n}),
        {},
        "\\(E·rank, in\\) and \\(out, rank·E\\)",
    ),
    "a vector": (
        "one",
        lambda t: t.update({f"{n[:-7]}.bias": t[n][:, 0] for n in list(t) if "lora_B" in n}),
        {},
        "vectors beside them",
    ),
    "type": ("one", lambda t: t.update({n: t[n].double() for n in t}), {}, "float64"),
    "NaN": ("one", lambda t: next(iter(t.values())).fill_(float("nan")), {}, "NaN or infinity"),
    "norm": ("one", lambda t: [x.mul_(1e6) for x in t.values()], {}, "has the norm"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_stack_of_factors_is_refused(tmp_path: Path, kind: str) -> None:
    saved, edit, config, message = REFUSED[kind]
    _save(tmp_path, saved)
    assert read_adapter(tmp_path).parameters
    edit_tensors(tmp_path, edit)
    edit_config(tmp_path, **config)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path)


def test_names_that_only_begin_as_nested_ones_do_are_modules(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    edit_tensors(tmp_path, lambda t: [_rename(t, n, "self_attn", "base_layers") for n in list(t)])
    assert "model.layers.0.base_layers.q_proj" in read_adapter(tmp_path).modules


def _rename(tensors: dict[str, Tensor], name: str, old: str, new: str) -> None:
    tensors[name.replace(old, new)] = tensors.pop(name)


def test_many_targets_and_many_modules_are_matched_at_once(tmp_path: Path) -> None:
    """Each with each would be hundreds of millions of comparisons, in files that are allowed."""
    _save(tmp_path, "both")
    tensors = {
        f"base_model.model.m{n}.q.lora_{f}.weight": torch.ones((1, 2) if f == "A" else (2, 1))
        for n in range(8_000)
        for f in "AB"
    }
    edit_tensors(tmp_path, lambda t: (t.clear(), t.update(tensors)))
    targets = [f"a{n}.experts.down_proj" for n in range(60_000)]
    edit_config(tmp_path, target_parameters=targets, r=1)
    assert len(read_adapter(tmp_path).modules) == 8_000
    edit_config(tmp_path, target_parameters=None, target_modules=targets, layers_to_transform=[0])
    assert len(read_adapter(tmp_path).modules) == 8_000


LEAVES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
BLOCKS = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}


def _save_single(directory: Path, family: str, *, ranks: tuple[int, int, int] = (3, 3, 3)) -> Path:
    """An adapter as peft and transformers 4 saved it: every expert has modules of its own."""
    gate, up, down = LEAVES[family]
    width, inner = 32, tiny(family).get_parameter("model.layers.0.mlp.experts.down_proj").shape[2]
    sizes = {gate: (width, inner), up: (width, inner), down: (inner, width)}
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        block = f"base_model.model.model.layers.{layer}.{BLOCKS[family]}"
        for expert in range(4):
            for rank, (leaf, (size_in, size_out)) in zip(ranks, sizes.items(), strict=True):
                name = f"{block}.experts.{expert}.{leaf}"
                tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, size_in)
                tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(size_out, rank)
        tensors[f"{block}.gate.lora_A.weight"] = 0.3 * torch.randn(3, width)
        tensors[f"{block}.gate.lora_B.weight"] = 0.3 * torch.randn(4, 3)
    save_adapter(directory, family, target_modules=["q_proj"])
    edit_tensors(directory, lambda t: (t.clear(), t.update(tensors)))
    patterns = {leaf: rank for leaf, rank in zip(sizes, ranks, strict=True) if rank != 3}
    edit_config(directory, target_modules=[*sizes, "gate"], rank_pattern=patterns)
    return directory


@pytest.mark.parametrize("family", LEAVES)
def test_factors_of_single_experts_become_those_of_stacked_weights(
    tmp_path: Path, family: str
) -> None:
    single = read_adapter(_save_single(tmp_path, family))
    assert len(single.modules) == 2 * (4 * 3 + 1)
    assert not single.parameters
    assert not single.notes
    fused = fused_experts(single, num_experts=4)
    assert not fused.modules
    theirs = _wrappers(peft.PeftModel.from_pretrained(tiny(family), str(tmp_path)))
    assert set(fused.parameters) == set(theirs)
    for name, wrapper in theirs.items():
        parameter, expected = fused.parameters[name], wrapper.get_delta_weight("default")
        ours = _added(parameter).reshape(expected.shape)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(parameter.update_norm), expected.norm())
        assert expected.norm() > 0.1


def test_what_peft_does_not_convert_is_exact_too(tmp_path: Path) -> None:
    """Other ranks and scalings in one weight, a half and an expert without factors."""
    single = read_adapter(_save_single(tmp_path, "mixtral", ranks=(2, 5, 3)))
    lacking = "model.layers.0.block_sparse_moe.experts"
    modules = {
        name: module
        for name, module in single.modules.items()
        if name != f"{lacking}.1.w1" and not name.startswith(f"{lacking}.3.")
    }
    kept = Adapter(**{**vars(single), "modules": modules})
    parameter = fused_experts(kept, num_experts=6).parameters[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]
    update = _added(parameter)
    assert update.shape == (6, 80, 32)
    assert parameter.rank == 7
    for expert in range(6):
        for leaf, rows in (("w1", slice(0, 40)), ("w3", slice(40, 80))):
            module = modules.get(f"{lacking}.{expert}.{leaf}")
            expected = torch.zeros(40, 32)
            if module is not None:
                assert module.scaling == 5 / (2 if leaf == "w1" else 5)
                expected = module.scaling * module.lora_B @ module.lora_A
            torch.testing.assert_close(update[expert, rows], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(parameter.update_norm), update.norm())


def test_what_has_no_stacked_place_is_refused(tmp_path: Path) -> None:
    single = read_adapter(_save_single(tmp_path, "mixtral"))
    with pytest.raises(CheckpointError, match=r"expert 3 of .*, and the base has 3"):
        fused_experts(single, num_experts=3)
    name, module = next(iter(single.modules.items()))
    biased = {**vars(module), "bias": module.lora_B[:, 0]}
    other = Adapter(**{**vars(single), "modules": {name: type(module)(**biased)}})
    with pytest.raises(ConfigError, match="has a bias or is a DoRA"):
        fused_experts(other, num_experts=4)
    save_adapter(tmp_path / "plain")
    plain = read_adapter(tmp_path / "plain")
    assert fused_experts(plain, num_experts=4) is plain


def test_what_peft_saves_of_a_converted_adapter_is_read(tmp_path: Path) -> None:
    single = read_adapter(_save_single(tmp_path / "old", "mixtral"))
    model = peft.PeftModel.from_pretrained(tiny("mixtral"), str(tmp_path / "old"))
    model.save_pretrained(tmp_path / "new")
    assert "gate_up_proj" in json.dumps(json.loads((tmp_path / "new" / CONFIG).read_text()))
    new, old = read_adapter(tmp_path / "new"), fused_experts(single, num_experts=4)
    assert set(new.parameters) == set(old.parameters)
    for name, parameter in new.parameters.items():
        torch.testing.assert_close(_added(parameter), _added(old.parameters[name]))

"""Exports for servers: the same function as before, and every rule of the servers held."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_adapters import CONFIG, TENSORS, edit_config, edit_tensors, save_adapter
from safetensors.torch import save_file
from tiny_models import batch_for, tiny
from torch import Tensor, nn

import molora
from molora.compose.merging import merge
from molora.compose.servable import linear_shapes, servable, write_servable
from molora.compose.servable_rules import REFUSED, servable_faults
from molora.errors import CheckpointError, ConfigError
from molora.io.peft_adapter import AdapterModule, read_adapter

Modules = dict[str, AdapterModule]
LAYERS = "model.layers"


def updates(modules: Any) -> dict[str, Tensor]:
    return {p: m.scaling * m.lora_B.double() @ m.lora_A.double() for p, m in modules.items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch_for(model, labels=False)).logits
    return found


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A directory that every server loads: the sum of two unlike adapters."""
    adapters: dict[str, dict[str, Any]] = {
        "law": {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        "code": {"r": 6, "alpha_pattern": {"down_proj": 9}, "target_modules": ["down_proj"]},
    }
    for seed, (name, own) in enumerate(adapters.items()):
        save_adapter(tmp_path / name, seed=seed, **own)
    experts = molora.load_experts({name: tmp_path / name for name in adapters})
    merged = merge(experts, {"law": 0.8, "code": 1.5})
    write_servable(tmp_path / "good", merged.modules, base="org/base", shapes=SHAPES)
    return tmp_path / "good"


SHAPES = linear_shapes(tiny("llama"))


def test_the_export_is_the_merge_and_no_rule_is_broken(good: Path) -> None:
    experts = molora.load_experts({n: good.parent / n for n in ("law", "code")})
    merged = merge(experts, {"law": 0.8, "code": 1.5})
    found = read_adapter(good)
    assert servable_faults(good) == []
    assert servable_faults(good, layers=2) == []
    assert found.base == "org/base"
    assert not found.notes[1:]
    leaves = {path.rpartition(".")[2] for path in found.modules}
    assert leaves == {"q_proj", "k_proj", "v_proj", "down_proj"}
    dense = updates(found.modules)
    for path, update in updates(merged.modules).items():
        assert torch.allclose(dense[path], update, rtol=1e-6, atol=1e-9)
        assert update.norm() > 0.1
    for path in dense.keys() - merged.modules.keys():
        assert not dense[path].any()
    model = peft.PeftModel.from_pretrained(tiny("llama"), good).eval()
    reference = tiny("llama")
    with torch.no_grad():
        for path, update in updates(merged.modules).items():
            reference.get_submodule(path).weight += update.float()
    assert torch.allclose(logits(model), logits(reference), atol=2e-5)
    assert not torch.allclose(logits(tiny("llama")), logits(reference), atol=1e-2)


def factors(path: str, rank: int, out: int, size: int, **changes: Any) -> Modules:
    source = torch.Generator().manual_seed(rank)
    lora_A = torch.randn(rank, size, generator=source)
    lora_B = torch.randn(out, rank, generator=source)
    return {path: replace(AdapterModule(lora_A, lora_B, 0.3, 1.0), **changes)}


@pytest.mark.parametrize(("rank", "made"), [(1, 8), (8, 8), (9, 16), (33, 64), (128, 128)])
def test_ranks_are_rounded_up_with_zeros(rank: int, made: int) -> None:
    modules = factors("a.o_proj", rank, 7, 9) | factors("a.down_proj", 1, 7, 9)
    result = servable(modules)
    assert result.rank == made
    for path, module in result.modules.items():
        assert module.lora_A.shape == (made, 9)
        assert module.lora_B.shape == (7, made)
        assert module.scaling == 1
        assert not module.lora_A[modules[path].rank :].any()
        expected = updates(modules)[path]
        assert torch.allclose(updates(result.modules)[path], expected, rtol=1e-5, atol=1e-6)
        assert module.update_norm == pytest.approx(float(expected.norm()))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_the_cast_is_measured(dtype: torch.dtype, bound: float) -> None:
    modules = factors("a.o_proj", 4, 7, 9)
    result = servable(modules, dtype=dtype)
    found = result.modules["a.o_proj"]
    assert found.lora_A.dtype == found.lora_B.dtype == dtype
    expected = updates(modules)["a.o_proj"]
    error = float((updates(result.modules)["a.o_proj"] - expected).norm() / expected.norm())
    assert result.rounding == pytest.approx(error, rel=1e-6)
    assert bound / 100 < error < bound
    exact = servable(factors("a.o_proj", 4, 7, 9, scaling=0.5), dtype=torch.float32)
    assert exact.rounding == 0.0


def test_what_servers_expect_beside_is_filled_in() -> None:
    def paths(*modules: Modules, **options: Any) -> set[str]:
        merged = {path: one for part in modules for path, one in part.items()}
        result = servable(merged, **options)
        assert set(result.filled) == result.modules.keys() - merged.keys()
        for path in result.filled:
            assert not result.modules[path].lora_A.any()
            assert not result.modules[path].lora_B.any()
            assert result.modules[path].lora_B.shape[0] == options.get("shapes", SHAPES)[path][0]
        return set(result.filled)

    def of(layer: int, name: str) -> Modules:
        part = "self_attn" if name[0] in "qkvo" else "mlp"
        path = f"{LAYERS}.{layer}.{part}.{name}"
        return factors(path, 2, *SHAPES[path])

    attention = [f"{LAYERS}.{layer}.self_attn.{n}_proj" for layer in (0, 1) for n in "qkvo"]
    assert paths(of(1, "o_proj")) == {attention[3]}
    assert paths(of(0, "o_proj")) == set()  # how many layers there are is not known
    assert paths(of(0, "o_proj"), shapes=SHAPES) == {attention[7]}
    assert paths(of(0, "q_proj"), of(0, "v_proj")) == {attention[1]}
    assert paths(of(1, "q_proj"), of(0, "k_proj")) == {
        *(attention[0], attention[2], attention[5], attention[6])
    }
    assert paths(of(0, "q_proj"), shapes=SHAPES) == {
        path for path in attention[1:] if not path.endswith("o_proj")
    }
    assert paths(of(0, "up_proj")) == {f"{LAYERS}.0.mlp.gate_proj"}
    with pytest.raises(ConfigError, match=r"Servers expect .*k_proj beside .* no layer tells"):
        servable(of(0, "q_proj"))


def test_layers_of_each_stack_are_counted_apart() -> None:
    modules = {
        path: one
        for stack, count in {"encoder": 3, "decoder": 2}.items()
        for path, one in factors(f"{stack}.block.{count - 1}.layer.0.wo", 2, 7, 9).items()
    }
    filled = servable(modules).filled
    assert set(filled) == {
        *("encoder.block.0.layer.0.wo", "encoder.block.1.layer.0.wo", "decoder.block.0.layer.0.wo")
    }


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        ({}, {}, "no modules"),
        (factors("a.b", 129, 7, 9), {}, "rank is 129.*method='svd' and rank=128"),
        (factors("a.b", 2, 7, 9, bias=torch.ones(7)), {}, "a.b have a bias"),
        (factors("a.b", 2, 7, 9, magnitude=torch.ones(7)), {}, "a.b use DoRA"),
        (factors("a.b", 2, 7, 9), {"dtype": torch.float64}, "not torch.float64"),
        (factors("a.b", 2, 7, 9, scaling=1e6), {"dtype": torch.float16}, "beyond torch.float16"),
        (factors("a.b", 2, 7, 9), {"shapes": {"a.b": (7, 8)}}, "no linears of this base"),
        (factors("a.b", 2, 7, 9), {"shapes": {"a.c": (7, 9)}}, "no linears of this base"),
    ],
)
def test_what_cannot_be_served(modules: Modules, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        servable(modules, **options)


def test_a_bias_of_zeros_is_none() -> None:
    result = servable(factors("a.b", 2, 7, 9, bias=torch.zeros(7)))
    assert result.modules["a.b"].bias is None


def test_a_conv1d_has_its_sizes() -> None:
    shapes = linear_shapes(tiny("gpt2"))
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert shapes["transformer.h.0.mlp.c_proj"] == (32, 40)


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda directory: edit_config(directory, **changes)


def without(key: str) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        found = json.loads((directory / CONFIG).read_text())
        del found[key]
        (directory / CONFIG).write_text(json.dumps(found))

    return edit


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return lambda directory: edit_tensors(directory, edit)


def drop(part: str) -> Callable[[Path], object]:
    def edit(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if part in name]:
            del found[name]

    return tensors(edit)


def touch(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text("{}")


KEY = f"base_model.model.{LAYERS}.0.self_attn.q_proj.lora_A.weight"
BREACHES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / CONFIG).unlink(), "there is no adapter_config.json"),
    "no tensors": (lambda d: (d / TENSORS).unlink(), "there is no adapter_model.safetensors"),
    "r unset": (without("r"), "r is not set: vLLM requires it"),
    "alpha unset": (without("lora_alpha"), "lora_alpha is not set: vLLM requires it"),
    "targets unset": (without("target_modules"), "target_modules is not set: vLLM requires it"),
    "r of 0": (config(r=0, lora_alpha=0), "r is 0: kernels of Punica"),
    "odd r": (config(r=12, lora_alpha=12), "r is 12: kernels of Punica"),
    "large r": (config(r=512, lora_alpha=512), "r is 512: kernels of Punica"),
    "r of no rank": (config(r=16, lora_alpha=16), "SGLang and LoRAX expect a matrix with 16 rows"),
    "alpha": (config(lora_alpha=16), "lora_alpha is 16, not r"),
    "dora": (config(use_dora=True), "use_dora is set: vLLM and SGLang refuse DoRA"),
    "lora_bias": (config(lora_bias=True), "lora_bias is set: vLLM refuses lora_bias"),
    "modules_to_save": (config(modules_to_save=["x"]), "vLLM refuses modules_to_save"),
    "activated": (config(alora_invocation_tokens=[1]), "vLLM refuses activated LoRA"),
    "replication": (config(layer_replication=[[0, 2]]), "vLLM refuses layer_replication"),
    "bdlora": (config(use_bdlora={"x": 1}), "vLLM refuses block-diagonal LoRA"),
    "qalora": (config(use_qalora=True), "vLLM refuses QA-LoRA"),
    "bias": (config(bias="all"), "bias is 'all': vLLM refuses it"),
    "pissa": (config(init_lora_weights="pissa"), "init_lora_weights is 'pissa': vLLM refuses it"),
    "no lora": (config(peft_type="LOHA"), "peft_type is 'LOHA': SGLang asserts LORA"),
    "rslora": (config(use_rslora=True), "SGLang ignores rsLoRA"),
    "rank pattern": (config(rank_pattern={"q": 8}), "SGLang ignores rank_pattern"),
    "alpha pattern": (config(alpha_pattern={"q": 8}), "SGLang ignores alpha_pattern"),
    "regex": (config(target_modules=".*q_proj"), "SGLang and LoRAX read a list of names"),
    "paths": (config(target_modules=["self_attn.q_proj"]), "SGLang compares the last part"),
    "surplus target": (
        config(target_modules=["q_proj", "k_proj", "v_proj", "down_proj", "o_proj"]),
        "target_modules name o_proj, which has no tensors",
    ),
    "missing target": (
        config(target_modules=["q_proj", "k_proj", "v_proj"]),
        "down_proj has tensors, and target_modules do not name it",
    ),
    "added tokens": (touch("added_tokens.json"), "SGLang refuses adapters that add tokens"),
    "other weights": (touch("more.safetensors"), "more.safetensors: SGLang and S-LoRA read every"),
    "no q": (drop("0.self_attn.q_proj"), "layers.0.self_attn has no q_proj: SGLang fuses"),
    "no k": (drop("1.self_attn.k_proj"), "layers.1.self_attn has no k_proj: SGLang fuses"),
    "no v": (drop("1.self_attn.v_proj"), "layers.1.self_attn has no v_proj: SGLang fuses"),
    "a layer without": (drop("0.mlp.down_proj"), "mlp.down_proj is not in layers 0: LoRAX drops"),
    "half a pair": (drop("1.mlp.down_proj.lora_B"), "layers.1.mlp.down_proj has no lora_B"),
    "another name": (
        tensors(lambda t: t.update({KEY.replace("base_model.model.", ""): t.pop(KEY)})),
        "vLLM reads base_model.model.….lora_A.weight",
    ),
    "an embedding": (
        tensors(lambda t: t.update({"base_model.model.x.lora_embedding_A": torch.ones(8, 2)})),
        "vLLM reads base_model.model.….lora_A.weight",
    ),
    "type": (
        tensors(lambda t: t.update({KEY: t[KEY].double()})),
        "q_proj.lora_A.weight is float64: servers read float32",
    ),
    "rank of a tensor": (
        tensors(lambda t: t.update({KEY: t[KEY][:4]})),
        "lora_A of model.layers.0.self_attn.q_proj is [4, 32]: with r 8 SGLang and LoRAX expect",
    ),
    "nothing": (drop("lora"), "adapter_model.safetensors holds nothing"),
}  # fmt: skip


@pytest.mark.parametrize("rule", BREACHES)
def test_a_breach_of_each_rule_is_found(rule: str, good: Path) -> None:
    assert servable_faults(good) == []
    edit, message = BREACHES[rule]
    edit(good)
    faults = servable_faults(good)
    assert any(message in fault for fault in faults), faults
    assert len(faults) == 1 or rule not in ("paths", "alpha", "dora", "type"), faults


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
SETTINGS = [*REFUSED, "r", "lora_alpha", "target_modules", "bias", "init_lora_weights", "peft_type"]
NAMES = st.lists(
    st.sampled_from(
        ["base_model.model", "layers", "0", "9999", "77777", "q_proj", "x\x1b", "lora_A"]
    ),
    max_size=6,
).map(".".join)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(SETTINGS), VALUES),
    st.dictionaries(NAMES, st.sampled_from([(), (8,), (8, 2), (2, 8), (8, 2, 1)]), max_size=6),
    st.sampled_from([".weight", ".bias", ""]),
)
def test_whatever_the_files_say_there_is_a_list_of_faults(
    values: dict[str, Any], shapes: dict[str, tuple[int, ...]], end: str
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / CONFIG).write_text(json.dumps(values))
        found = {f"{name}{end}": torch.zeros(shape) for name, shape in shapes.items()}
        save_file(found, Path(directory) / TENSORS)
        faults = servable_faults(Path(directory))
    assert faults
    assert all(fault.isprintable() and len(fault) < 5000 for fault in faults)


def test_a_thousand_faults_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    save_file({f"x{i}": torch.zeros(1) for i in range(999)}, tmp_path / TENSORS)
    faults = servable_faults(tmp_path)
    assert len(faults) == 101
    assert re.fullmatch(r"and 9\d\d more", faults[-1])


def test_layers_without_end_are_not_filled_in() -> None:
    with pytest.raises(ConfigError, match=r"Layer 9998 is adapted; of at most 1000"):
        servable(factors("model.layers.9998.o_proj", 2, 7, 9))
    assert len(servable(factors("model.layers.999.o_proj", 2, 7, 9)).filled) == 999


def test_gate_and_up_come_together(tmp_path: Path) -> None:
    path = f"{LAYERS}.0.mlp.up_proj"
    write_servable(tmp_path / "x", factors(path, 8, *SHAPES[path]))
    assert servable_faults(tmp_path / "x") == []
    assert servable_faults(tmp_path / "x", layers=2) == [
        f"{LAYERS}.*.mlp.{name} is not in layers 1: LoRAX drops it in all of them"
        for name in ("gate_proj", "up_proj")
    ]
    drop("gate_proj")(tmp_path / "x")
    assert any("mlp has no gate_proj" in fault for fault in servable_faults(tmp_path / "x"))


def test_a_plain_adapter_of_peft_has_faults_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", use_rslora=True)
    assert len(servable_faults(tmp_path / "a")) >= 4
    (tmp_path / "a" / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        servable_faults(tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text("{}")
    (tmp_path / "a" / TENSORS).write_bytes(b"\0" * 40)
    with pytest.raises(CheckpointError, match="truncated"):
        servable_faults(tmp_path / "a")

"""Adapters as experts: what package peft computes with a directory is what was read from it."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft_adapters import edit_config, edit_tensors, save_adapter
from tiny_models import batch_for, tiny
from torch import Tensor, nn

import molora
from molora.io.peft_adapter import Adapter

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "r": 6}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "regex": ("qwen3", {"target_modules": r".*\.(mlp\.(up|down)_proj|self_attn\.o_proj)"}),
    "layers": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            # the first that matches counts; a match starts at a dot, so proj alone matches nothing
            "rank_pattern": {r".*layers\.0\..*k_proj": 2, "k_proj": 5, "proj": 7, "v_proj": 4},
            "alpha_pattern": {r".*1\..*\.(q|v)_proj": 11, "down_proj": 2.5, "proj": 7, "v_proj": 9},
        },
    ),
    "rslora patterns": (
        "mistral",
        {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"^model.*v_proj": 3}},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "encoder": ("roberta", {"target_modules": ["query", "dense"]}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "wo"]}),
    "lora_bias": ("roberta", {"target_modules": ["query", "dense"], "lora_bias": True}),
    "lora_bias on conv1d": (
        "gpt2",
        {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
    ),
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "dora beside biases": ("qwen2", {"use_dora": True, "use_rslora": True}),
    "dora on conv1d": (
        "gpt2",
        {"use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
}


def _update(adapter: Adapter, layer: nn.Module, path: str, x: Tensor) -> Tensor:
    """What the adapter adds to the output of the layer of the base."""
    module = adapter.modules[path]
    update = module.scaling * (x @ module.lora_A.to(x).T @ module.lora_B.to(x).T)
    if module.bias is not None:
        update = update + module.scaling * module.bias
    if module.magnitude is not None:
        weight_FD = layer.weight.T if adapter.fan_in_fan_out else layer.weight
        rows = weight_FD + module.scaling * module.lora_B.to(x) @ module.lora_A.to(x)
        c_F = module.magnitude / rows.norm(dim=1)
        update = (c_F - 1) * (x @ weight_FD.T) + c_F * update
    return update


def _adapted(family: str, adapter: Adapter, *, skip: str | None = None) -> nn.Module:
    """The base with what was read added by hooks; without that of the module `skip`."""
    model = tiny(family)
    for path in adapter.modules:
        if path != skip:
            model.get_submodule(path).register_forward_hook(
                lambda layer, inputs, out, path=path: out + _update(adapter, layer, path, inputs[0])
            )
    return model


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        out: Tensor = model(**batch_for(base, labels=False)).logits
    return out


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_whole_model_gives_what_peft_gives(tmp_path: Path, kind: str) -> None:
    family, settings = ADAPTERS[kind]
    theirs = save_adapter(tmp_path, family, **settings)
    experts = molora.load_experts({"one": tmp_path})
    adapter = experts.adapters["one"]
    expected = _logits(theirs)
    torch.testing.assert_close(_logits(_adapted(family, adapter)), expected, atol=2e-5, rtol=2e-5)
    lacking = _logits(_adapted(family, adapter, skip=experts.modules[-1]))
    assert (lacking - expected).abs().max() > 1e-3
    # v_proj of layer 1 has two patterns
    assert len(experts.notes) == (kind == "patterns")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_each_module_gives_what_peft_gives(tmp_path: Path, kind: str) -> None:
    family, settings = ADAPTERS[kind]
    theirs = save_adapter(tmp_path, family, **settings)
    adapter = molora.load_experts({"one": tmp_path}).adapters["one"]
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert set(layers) == set(adapter.modules)
    for path, layer in layers.items():
        module = adapter.modules[path]
        assert module.scaling == layer.scaling["default"]
        assert module.rank == layer.r["default"]
        x = torch.randn(4, module.lora_A.shape[1])
        base = layer.get_base_layer()(x)
        ours = base + _update(adapter, layer.get_base_layer(), path, x)
        torch.testing.assert_close(ours, layer(x), atol=4e-6, rtol=4e-6)
        assert (base - layer(x)).abs().max() > 1e-3
        for part in ("bias", "magnitude"):
            if getattr(module, part) is not None:
                plain = dataclasses.replace(module, **{part: None})
                plain = dataclasses.replace(adapter, modules={path: plain})
                lacking = base + _update(plain, layer.get_base_layer(), path, x)
                assert (lacking - layer(x)).abs().max() > 1e-3
        delta = layer.get_delta_weight("default")
        torch.testing.assert_close(torch.tensor(module.update_norm), delta.norm())


KINDS_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bias": ("gpt2", {"bias": "lora_only", "target_modules": ["c_fc"]}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}),
    "trainable_token_indices": ("llama", {"trainable_token_indices": [3, 4]}),
    "init_lora_weights": ("llama", {"init_lora_weights": "olora"}),
}


@pytest.mark.parametrize("key", KINDS_REFUSED)
def test_what_peft_saves_beside_factors_is_refused(tmp_path: Path, key: str) -> None:
    family, settings = KINDS_REFUSED[key]
    save_adapter(tmp_path, family, **settings)
    with pytest.raises(molora.ConfigError, match=f"{key} is "):
        molora.load_experts({"one": tmp_path})
    if key != "init_lora_weights":
        # the tensors say it too
        neutral: dict[str, Any] = {"bias": "none"}
        edit_config(tmp_path, **{key: neutral.get(key)})
        with pytest.raises(molora.CheckpointError):
            molora.load_experts({"one": tmp_path})


def test_an_activated_adapter_acts_from_the_last_place_of_its_tokens(tmp_path: Path) -> None:
    invoked = [7, 8]
    theirs = save_adapter(tmp_path, alora_invocation_tokens=invoked, task_type="CAUSAL_LM")
    ids_BS = torch.tensor([[7, 8, 5, 7, 8, 9, 4], [5, 8, 7, 6, 4, 3, 9], [3, 7, 8, 8, 7, 5, 6]])
    adapter = molora.load_experts({"one": tmp_path}).adapters["one"]
    assert adapter.invocation_tokens == (7, 8)
    active_BS = torch.zeros(ids_BS.shape, dtype=torch.bool)
    active_BS[0, 3:] = active_BS[2, 1:] = True
    model = tiny("llama")
    for path in adapter.modules:
        model.get_submodule(path).register_forward_hook(
            lambda layer, inputs, out, path=path: (
                out + active_BS[..., None] * _update(adapter, layer, path, inputs[0])
            )
        )
    with torch.no_grad():
        expected, ours = theirs(input_ids=ids_BS).logits, model(input_ids=ids_BS).logits
        everywhere = _adapted("llama", adapter)(input_ids=ids_BS).logits
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    assert (everywhere - expected)[:, 0].abs().amax(-1).min() > 1e-3


def test_an_adapter_that_peft_converted_to_plain_lora_acts_on_the_untouched_base(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(tiny("llama"), lora).eval()
    lora.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    lora.init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    expected = _logits(model)
    start = str(tmp_path / "start")
    model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=start)
    adapter = molora.load_experts({"one": tmp_path / "new"}).adapters["one"]
    assert {module.rank for module in adapter.modules.values()} == {6}
    ours = _logits(_adapted("llama", adapter))
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=5e-5)
    assert (ours - _logits(tiny("llama"))).abs().max() > 1e-3


def test_patterns_that_saving_sorted_act_as_peft_loads_them(tmp_path: Path) -> None:
    trained = save_adapter(tmp_path, alpha_pattern={"q_proj": 20, ".*_proj": 2})
    loaded = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    experts = molora.load_experts({"one": tmp_path})
    ours = _logits(_adapted("llama", experts.adapters["one"]))
    torch.testing.assert_close(ours, _logits(loaded), atol=2e-5, rtol=2e-5)
    assert (ours - _logits(trained)).abs().max() > 1e-3
    (note,) = experts.notes
    assert "alpha_pattern decides at model.layers.0.self_attn.q_proj" in note
    assert "v_proj" not in note


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_stay_in_the_type_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({name: t[name].to(dtype) for name in t}))
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    adapter = molora.load_experts({"one": tmp_path}).adapters["one"]
    assert {m.lora_A.dtype for m in adapter.modules.values()} == {dtype}
    ours = _logits(_adapted("llama", adapter))
    torch.testing.assert_close(ours, _logits(theirs), atol=2e-5, rtol=2e-5)


def test_experts_of_other_ranks_targets_and_layers_are_one_set(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", target_modules=["q_proj"], r=2)
    save_adapter(tmp_path / "b", target_modules=["q_proj", "up_proj"], r=5, lora_alpha=1)
    save_adapter(tmp_path / "c", target_modules=["q_proj"], layers_to_transform=[1])
    experts = molora.load_experts({name: tmp_path / name for name in "cab"})
    assert experts.names == ("c", "a", "b")
    assert experts.modules[0] == "model.layers.1.self_attn.q_proj"
    assert set(experts.modules) == set(experts.adapters["b"].modules)
    assert experts.present("model.layers.0.self_attn.q_proj") == (False, True, True)
    assert experts.present("model.layers.0.mlp.up_proj") == (False, False, True)
    ranks = [a.modules["model.layers.1.self_attn.q_proj"].rank for a in experts.adapters.values()]
    assert ranks == [3, 2, 5]


def test_loading_leaves_the_files_and_writing_to_factors_too(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    adapter = molora.load_experts({"one": tmp_path}).adapters["one"]
    for module in adapter.modules.values():
        module.lora_A.zero_()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(TypeError):
        adapter.modules["other"] = module  # type: ignore[index]


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a.b", "-a", "a" * 65, "a\n", "ä"])
def test_names_that_could_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    save_adapter(tmp_path)
    with pytest.raises(molora.ConfigError, match="cannot be called"):
        molora.load_experts({name: tmp_path})
    assert molora.load_experts({"a" * 64: tmp_path}).names == ("a" * 64,)


def test_a_set_has_experts() -> None:
    with pytest.raises(molora.ConfigError, match="give 1 to"):
        molora.load_experts({})


def test_experts_for_bases_of_other_sizes_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a")
    save_adapter(tmp_path / "b")
    edit_tensors(tmp_path / "b", lambda t: t.update({n: t[n].repeat(1, 2) for n in t if "A" in n}))
    with pytest.raises(molora.CheckpointError, match=r"maps 64 to 48 .* but 32 to 48 in a"):
        molora.load_experts({"a": tmp_path / "a", "b": tmp_path / "b"})


def test_notes_name_bases_twins_and_outliers(tmp_path: Path) -> None:
    names = "abcd"
    for seed, name in enumerate(names):
        save_adapter(tmp_path / name, seed=seed)
        edit_config(tmp_path / name, base_model_name_or_path="x" if name == "b" else "y")
    quiet = molora.load_experts({name: tmp_path / name for name in "acd"})
    assert not quiet.notes
    edit_config(tmp_path / "d", lora_alpha=5000)
    dirs = {name: tmp_path / name for name in names} | {"again": tmp_path / "a"}
    notes = "\n".join(molora.load_experts(dirs).notes)
    assert "b: trained on 'x', revision None; other experts name another base" in notes
    assert "a, again: their tensors are the same" in notes
    assert "d: the update is more than 10 times the experts' median at model.layers.0" in notes
    assert "c: " not in notes


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def test_a_set_takes_no_memory_beside_its_files(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", target_modules=["q_proj"], r=400)
    wide = {f"model.l{i}.q.lora_{f}.weight": torch.randn(400, 2000) for i in range(2) for f in "AB"}
    wide = {name: x.T if "B" in name else x for name, x in wide.items()}
    edit_tensors(tmp_path / "a", lambda t: (t.clear(), t.update(wide)))
    for name in "bcdefg":
        shutil.copytree(tmp_path / "a", tmp_path / name)
    before = _anonymous_bytes()
    experts = molora.load_experts({name: tmp_path / name for name in "abcdefg"})
    modules = [
        module for adapter in experts.adapters.values() for module in adapter.modules.values()
    ]
    size = sum(m.lora_A.nbytes + m.lora_B.nbytes for m in modules)
    assert size > 80e6
    assert _anonymous_bytes() - before < 0.15 * size
    copies = [module.lora_A.clone() for module in modules]
    assert _anonymous_bytes() - before > 0.45 * size
    assert len(copies) == 14


@pytest.mark.parametrize("progress", [None, False, True])
def test_progress_is_shown_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool | None
) -> None:
    save_adapter(tmp_path)
    many = {f"e{n}": tmp_path for n in range(20)}
    assert len(molora.load_experts(many, progress=progress).names) == 20
    out, err = capsys.readouterr()
    assert not out
    assert ("Reading experts" in err and "100%" in err) is bool(progress)


def test_many_experts_show_progress_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    save_adapter(tmp_path)
    molora.load_experts({f"e{n}": tmp_path for n in range(15)})
    assert not capsys.readouterr().err
    molora.load_experts({f"e{n}": tmp_path for n in range(16)})
    assert "Reading experts" in capsys.readouterr().err

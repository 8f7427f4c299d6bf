"""`molora export`: what package peft and transformers read computes what the mixture computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from chat_models import save_chat_model
from peft_experts import UNLIKE, save_experts
from safetensors.torch import load_file, save_file
from tiny_models import batch_for
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import molora as package
from molora.compose import export
from molora.compose.servable_rules import servable_faults

KINDS = {**UNLIKE, "dora": {"r": 2, "use_dora": True, "target_modules": ["k_proj", "q_proj"]}}
WEIGHTS = {"math": 0.5, "code": -1.25, "law": 2.0, "dora": 0.75}


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_experts(tmp_path_factory.mktemp("experts"), base, KINDS)


@pytest.fixture
def saved(base: Path, experts: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """(names, router, …) → a saved composition."""

    def save(*names: str, router: Any = "fixed", **options: Any) -> Path:
        chosen = {name: experts[name] for name in names or experts}
        if router == "fixed":
            weights = {name: WEIGHTS[name] for name in chosen}
            if options.get("missing") == "renorm":  # which negative ones do not have
                weights = {name: abs(weight) for name, weight in weights.items()}
            router = {"kind": "fixed", "weights": weights}
        read = package.load_experts(chosen)
        mixture = package.compose(plain(base), read, router=router, **options)
        mixture.save(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def plain(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch_for(model, labels=False)).logits
    return found.float()


def logits_of(base: Path, directory: Path) -> Tensor:
    return logits(package.load(plain(base), directory).model)


def test_each_expert_comes_back_as_package_peft_saved_it(
    molora: Callable[..., Any],
    base: Path,
    experts: dict[str, Path],
    saved: Callable[..., Path],
    tmp_path: Path,
) -> None:
    outcome = molora("export", saved(router="linear"), "--to", "peft-each")
    assert outcome.code == 0, outcome.err
    (tmp_path / "saved-peft-each").rename(tmp_path / "o")
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == sorted(experts)
    for name, source in experts.items():
        assert f"{name} is in {tmp_path / 'saved-peft-each' / name}" in outcome.out
        file = "adapter_model.safetensors"
        before, after = load_file(source / file), load_file(tmp_path / "o" / name / file)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype
            assert torch.equal(after[key], tensor), (name, key)
        theirs = logits(peft.PeftModel.from_pretrained(plain(base), source))
        ours = logits(peft.PeftModel.from_pretrained(plain(base), tmp_path / "o" / name))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert (ours - logits(plain(base))).abs().max() > 0.05


def test_fixed_weights_are_one_lora_that_servers_load(
    molora: Callable[..., Any],
    base: Path,
    saved: Callable[..., Path],
    tmp_path: Path,
) -> None:
    directory = saved("math", "code", "law", missing="renorm")
    outcome = molora("export", directory, "--to", "peft", "--out", tmp_path / "one")
    assert outcome.code == 0, outcome.err
    assert "of rank 16 on 8 linears" in outcome.out  # 3 + 3 + 5, with k_proj for q and v
    assert servable_faults(tmp_path / "one", layers=2) == []
    found = logits(peft.PeftModel.from_pretrained(plain(base), tmp_path / "one"))
    expected = logits_of(base, directory)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - logits(plain(base))).abs().max() > 0.05
    settings = ["method=svd", "rank=4", "--dtype", "bfloat16", "--out", tmp_path / "small"]
    outcome = molora("export", directory, "--to", "peft", *settings)
    assert outcome.code == 0, outcome.err
    assert "3 experts by svd" in outcome.out
    assert "of rank 8" in outcome.out
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_xlora_is_one_that_package_peft_loads(
    molora: Callable[..., Any], base: Path, saved: Callable[..., Path], tmp_path: Path
) -> None:
    directory = saved("math", "law", router={"kind": "xlora", "depth": 2, "width": 8})
    outcome = molora("export", directory, "--to", "peft-xlora", "--out", tmp_path / "xlora")
    assert outcome.code == 0, outcome.err
    model = plain(base)
    model.config.use_cache = False  # package peft's X-LoRA refuses a cache
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "xlora").eval()
    expected = logits_of(base, directory)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(plain(base))).abs().max() > 0.05
    other = saved("math", "law", router="linear")
    outcome = molora("export", other, "--to", "peft-xlora", "--out", tmp_path / "other")
    assert outcome.code == 2
    assert "only X-LoRA can be exported" in outcome.err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("missing", ["mask", "renorm", "zero"])
@pytest.mark.parametrize("router", ["fixed", "uniform"])
def test_merged_model_computes_what_the_mixture_computes(
    molora: Callable[..., Any],
    base: Path,
    saved: Callable[..., Path],
    tmp_path: Path,
    router: str,
    missing: str,
) -> None:
    directory = saved(router=router, missing=missing)
    outcome = molora("export", directory, "--to", "merged", "--out", tmp_path / "model")
    assert outcome.code == 0, outcome.err
    assert "8 merged linears" in outcome.out  # q, k, v and down of two layers
    found = logits(plain(tmp_path / "model"))
    torch.testing.assert_close(found, logits_of(base, directory), rtol=1e-4, atol=1e-4)
    assert (found - logits(plain(base))).abs().max() > 0.05
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("Hi").input_ids == AutoTokenizer.from_pretrained(base)("Hi").input_ids


def test_merged_model_has_the_type_that_is_asked_for(
    molora: Callable[..., Any], base: Path, saved: Callable[..., Path], tmp_path: Path
) -> None:
    directory = saved()
    arguments = ["--to", "merged", "--dtype", "bfloat16", "--out", tmp_path / "model"]
    outcome = molora("export", directory, *arguments)
    assert outcome.code == 0, outcome.err
    model = plain(tmp_path / "model", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = logits_of(base, directory)
    error = (logits(model) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.1
    assert "in torch.bfloat16" in outcome.out


def test_conv1d_and_biases_are_merged(tmp_path: Path) -> None:
    gpt2 = save_chat_model(tmp_path / "gpt2", family="gpt2")
    kinds = {
        "a": {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
        "b": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "use_dora": True},
    }
    directories = save_experts(tmp_path / "experts", gpt2, kinds)
    for path in directories.values():  # biases start at zero
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("lora_B.bias"):
                tensor.normal_(std=0.3)
        file.unlink()
        save_file(tensors, file)
    mixture = package.compose(plain(gpt2), package.load_experts(directories), router="uniform")
    expected = logits(mixture.model)
    mixture.save(tmp_path / "saved")
    made = export.export_merged(plain(gpt2), tmp_path / "saved", tmp_path / "out")
    found = logits(plain(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - logits(plain(gpt2))).abs().max() > 0.05
    assert made.linears == 4
    model = plain(gpt2)
    export.export_each(tmp_path / "saved", tmp_path / "each", model=model)
    config = json.loads((tmp_path / "each" / "a" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


STACKED: dict[str, dict[str, Any]] = {
    "both": {
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "target_modules": ["q_proj"],
    },
    "plain": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "one": {"r": 2, "target_parameters": ["mlp.experts.down_proj"], "target_modules": []},
}


@pytest.mark.parametrize("missing", ["zero", "renorm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_of_stacked_weights_are_merged_and_come_back(
    molora: Callable[..., Any], tmp_path: Path, family: str, missing: str
) -> None:
    moe = save_chat_model(tmp_path / "moe", family=family)
    kinds = {name: {"r": 3, "lora_dropout": 0.0, **own} for name, own in STACKED.items()}
    directories = save_experts(tmp_path / "experts", moe, kinds)
    sign = 1 if missing == "renorm" else -1
    router = {"kind": "fixed", "weights": {"both": 0.75, "plain": 1.5, "one": sign * 0.5}}
    read = package.load_experts(directories)
    mixture = package.compose(plain(moe), read, router=router, missing=missing)
    expected = logits(mixture.model)
    mixture.save(tmp_path / "saved")
    outcome = molora("export", tmp_path / "saved", "--to", "merged", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "8 merged linears" in outcome.out  # q, v and two parameters of two layers
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(plain(moe))).abs().max() > 0.05
    each = molora("export", tmp_path / "saved", "--to", "peft-each", "--out", tmp_path / "each")
    assert each.code == 0, each.err
    back = package.load_experts({name: tmp_path / "each" / name for name in STACKED})
    for name, adapter in read.adapters.items():
        again = back.adapters[name]
        assert [*again.parameters] == [*adapter.parameters]
        for path, part in adapter.parameters.items():
            assert torch.equal(again.parameters[path].lora_A, part.lora_A)
            assert torch.equal(again.parameters[path].lora_B, part.lora_B)
            assert again.parameters[path].scaling == part.scaling
    outcome = molora("export", tmp_path / "saved", "--to", "peft", "--out", tmp_path / "one")
    assert outcome.code == 2
    assert "stacked weights" in outcome.err
    shown = molora("inspect", tmp_path / "saved").out
    assert "4 × (1×2 + 1×3)  mlp.experts: down_proj" in shown
    backends = shown.partition("backend")[2]
    assert "q_proj" in backends
    assert "mlp.experts" not in backends


def test_nothing_is_written_if_the_logits_differ(
    base: Path, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.merged_weight

    def wrong(linear: nn.Module, path: str) -> Any:
        weight, bias = real(linear, path)
        return (weight * 1.01 if "layers.1.self_attn.q_proj" in path else weight), bias

    monkeypatch.setattr(export, "merged_weight", wrong)
    with pytest.raises(package.CheckpointError, match="logits differ from the mixture's"):
        export.export_merged(plain(base), saved(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    export.export_merged(plain(base), tmp_path / "saved", tmp_path / "out")


def test_a_bias_without_a_place_is_named(base: Path, tmp_path: Path) -> None:
    kinds = {"a": {"target_modules": ["q_proj"], "lora_bias": True}}
    directories = save_experts(tmp_path / "experts", base, kinds)
    mixture = package.compose(plain(base), package.load_experts(directories), router="uniform")
    for name, tensor in mixture.state_dict().items():
        if name.endswith("experts.bias"):
            tensor.fill_(0.5)
    mixture.save(tmp_path / "saved")
    with pytest.raises(package.ConfigError, match=r"lora_bias.*where the base has none"):
        export.export_merged(plain(base), tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["merged", "peft"])
@pytest.mark.parametrize("router", ["arrow", "linear"])
def test_mixtures_that_choose_refuse_to_be_one_matrix(
    molora: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path, to: str, router: str
) -> None:
    outcome = molora("export", saved(router=router), "--to", to, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "chooses experts by what it reads" in outcome.err
    assert "peft-each" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "peft-all"], "Close names: peft"),
        (["--to", "peft-xlora", "--dtype", "float16"], "leaves every expert as it is"),
        (["--to", "merged", "--dtype", "bf16"], "unknown dtype 'bf16'"),
        (["--to", "merged", "rank=3"], "only --to peft merges"),
        (["--to", "peft-each", "--dtype", "float16"], "leaves every expert as it is"),
        (["--to", "peft", "methd=svd"], "Close names: method"),
        (["--to", "peft", "method=svd", "rank=x"], "merge.rank='x'"),
        (["--to", "peft"], "uses DoRA"),
        (["--to", "merged", "--base", "nowhere/at/all"], "cannot be loaded"),
        (["--to", "peft-each", "--out", "{saved}"], "is not empty"),
        (["--to", "merged", "--out", "{saved}"], "is not empty"),
    ],
)
def test_a_users_error_is_exit_code_2_and_one_message(
    molora: Callable[..., Any],
    saved: Callable[..., Path],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    directory = saved()
    files = sorted(directory.iterdir())
    filled = [argument.replace("{saved}", str(directory)) for argument in arguments]
    outcome = molora("export", directory, "--out", tmp_path / "out", *filled)
    assert (outcome.code, outcome.err.count("Error")) == (2, 1)
    assert message in outcome.err
    assert not (tmp_path / "out").exists()
    assert sorted(directory.iterdir()) == files


def test_mixtures_of_other_experts_are_named(
    molora: Callable[..., Any], adapter: Path, tmp_path: Path
) -> None:
    for to in ("peft", "peft-each", "merged"):
        outcome = molora("export", adapter, "--to", to, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert "holds no experts that were trained elsewhere" in outcome.err

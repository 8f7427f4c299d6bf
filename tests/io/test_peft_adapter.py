"""Directories of published adapters: every name that is read, and every file that is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import CONFIG, TENSORS, edit_config, edit_tensors, save_adapter
from safetensors.torch import save_file
from torch import Tensor

import molora
from molora.errors import CheckpointError, ConfigError, MoLoRAError
from molora.io import peft_files, peft_keys
from molora.io.peft_adapter import read_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    save_adapter(directory)
    return directory


@pytest.fixture
def adapter(saved_once: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved_once, tmp_path / "adapter")


def _renamed(rename: Callable[[str], str]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return edit


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".my-adapter.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
        lambda name: name.replace("self_attn", "_checkpoint_wrapped_module.self_attn"),
    ],
)
def test_variants_of_names_are_one_adapter(
    adapter: Path, saved_once: Path, rename: Callable[[str], str]
) -> None:
    edit_tensors(adapter, _renamed(rename))
    expected, found = read_adapter(saved_once).modules, read_adapter(adapter).modules
    assert set(found) == set(expected)
    for name, module in found.items():
        assert torch.equal(module.lora_A, expected[name].lora_A)
        assert torch.equal(module.lora_B, expected[name].lora_B)
        assert module.scaling == expected[name].scaling == 5 / 3


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "DoRA": (
        lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(48)}),
        "has a lora_magnitude_vector of .* but use_dora is False",
    ),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed.lora_embedding_A": torch.ones(3, 9)}),
        "factor of an embedding",
    ),
    "lora_bias": (
        lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(48)}),
        "has a lora_B.bias of .* but lora_bias is False",
    ),
    "bias of A": (lambda t: t.update({f"{Q0}.lora_A.bias": torch.ones(3)}), "within a factor"),
    "vector alone": (lambda t: t.update({f"{Q0}x.lora_magnitude_vector": t[B][:, 0]}), "no lora_A"),
    "bias": (lambda t: t.update({f"{Q0}.base_layer.bias": torch.ones(48)}), "bias of the base"),
    "KaSA": (lambda t: t.update({f"{Q0}.lora_diag": torch.ones(3)}), "KaSA"),
    "module": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 4)}),
        "modules_to_save",
    ),
    "token rows": (
        lambda t: t.update({"base_model.model.e.token_adapter.trainable_tokens_delta": t[A]}),
        "replace an embedding's",
    ),
    "MoE": (
        _renamed(lambda name: name.replace("v_proj", "q_proj.base_layer")),
        "has factors of 2 parameters of .*q_proj, and target_parameters name \\[\\]",
    ),
    "attention": (
        lambda t: t.update({f"{Q0}.base_layer.out_proj.lora_A.weight": t[A]}),
        "attention that torch fuses",
    ),
    "X-LoRA": (
        lambda t: t.update({"internal_xlora_classifier.0.weight": torch.ones(2, 2)}),
        "X-LoRA",
    ),
    "B alone": (lambda t: t.pop(A), "lora_B of .* but no lora_A"),
    "A alone": (lambda t: t.pop(B), "lora_A of .* but no lora_B"),
    "nothing": (lambda t: t.clear(), "holds 0 tensors"),
    "double": (lambda t: t.update({f"_orig_mod.{A}": t[A].clone()}), "are both lora_A"),
    "two prefixes": (
        lambda t: t.update({"x.lora_A.weight": t[A].clone(), "x.lora_B.weight": t[B].clone()}),
        "not of one adapter",
    ),
    "two adapters": (
        lambda t: t.update({A.replace("A.", "A.x."): t.pop(A), B.replace("B.", "B.x."): t.pop(B)}),
        "not of one adapter",
    ),
    "conv": (lambda t: t.update({A: t[A][..., None]}), "Convolutions"),
    "ranks": (lambda t: t.update({B: t[B][:, :2]}), "has 3 rows, lora_B 2 columns"),
    "other rank": (
        lambda t: t.update({A: t[A][:2], B: t[B][:, :2]}),
        "has rank 2, but adapter_config.json gives 3",
    ),
    "float64": (lambda t: t.update({A: t[A].double()}), "float64 .* factors are matrices"),
    "integers": (lambda t: t.update({A: t[A].to(torch.int8)}), "int8"),
    "empty": (lambda t: t.update({A: t[A][:, :0]}), "none of size 0"),
    "NaN": (lambda t: t[A].view(-1)[7].fill_(float("nan")), "lora_A of .* NaN or infinity"),
    "infinity": (lambda t: t[B].view(-1)[-1].fill_(float("-inf")), "lora_B of .* infinity"),
    "infinity beside zeros": (
        lambda t: (t[A].zero_(), t[B].view(-1)[0].fill_(float("inf"))),
        "lora_B of .* infinity",
    ),
    "NaN beside zeros": (
        lambda t: (t[B].zero_(), t[A].view(-1)[-1].fill_(float("nan"))),
        "lora_A of .* NaN",
    ),
    "norm": (lambda t: t[A].mul_(1e9), "has the norm .* at most 1e\\+06"),
    "overflow": (lambda t: (t[A].fill_(3e38), t[B].fill_(3e38)), "has the norm"),
    "escape": (
        lambda t: t.update({"a/../b.lora_A.weight": t[A], "a/../b.lora_B.weight": t[B]}),
        "names no module",
    ),
    "dunder": (
        _renamed(lambda name: name.replace("self_attn", "__class__")),
        "names no module",
    ),
    "long": (_renamed(lambda name: name.replace("self_attn", "a" * 513)), "at most 512"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_that_are_no_plain_expert_are_refused(adapter: Path, kind: str) -> None:
    edit, message = REFUSED[kind]
    edit_tensors(adapter, edit)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(adapter)


LEFT_OUT: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "modules_to_save": (
        "llama",
        {"modules_to_save": ["lm_head"]},
        [
            "modules_to_save was left out: whole modules",
            "left out: .*lm_head.*, a copy of the base",
        ],
    ),
    "token rows": (
        "llama",
        {"trainable_token_indices": [3, 4]},
        ["trainable_token_indices was left out: rows", "left out: .*, rows that replace"],
    ),
    "biases": (
        "qwen2",
        {"bias": "lora_only"},
        ["bias was left out: the base's biases", "left out: .* and 1 more, a trained bias"],
    ),
    "embedding": (
        "llama",
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        ["left out: .*, a factor of an embedding", "left out: .*, a copy of the base"],
    ),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_replaces_parts_of_the_base_is_left_out_where_it_is_asked_for(
    tmp_path: Path, kind: str
) -> None:
    family, settings, notes = LEFT_OUT[kind]
    save_adapter(tmp_path, family, **settings)
    with pytest.raises(MoLoRAError, match="leave_out=True, which takes the updates"):
        read_adapter(tmp_path)
    adapter = read_adapter(tmp_path, leave_out=True)
    ends = {name.rpartition(".")[2] for name in adapter.modules}
    assert ends == {"q_proj", "v_proj"}
    assert len(adapter.modules) == 4
    for note in notes:
        assert any(re.match(note, line) for line in adapter.notes), adapter.notes
    assert molora.load_experts({"a": tmp_path}, leave_out=True).notes[0].startswith("a: ")


def test_an_adapter_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="no factors of a linear layer"):
        read_adapter(tmp_path, leave_out=True)


def test_what_is_refused_for_another_reason_is_refused_still(adapter: Path) -> None:
    for kind in ("KaSA", "attention", "X-LoRA", "bias of A", "NaN", "B alone"):
        edit, message = REFUSED[kind]
        whole = (adapter / TENSORS).read_bytes()
        edit_tensors(adapter, edit)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(adapter, leave_out=True)
        (adapter / TENSORS).write_bytes(whole)


VECTORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "short bias": ("lora_bias", lambda v: v[:-1], r"float32 \[47\]; it has one of"),
    "matrix": ("use_dora", lambda v: v[None], "for each of the 48 rows"),
    "type": ("use_dora", lambda v: v.double(), "float64"),
    "NaN": ("use_dora", lambda v: v.index_fill(0, torch.tensor([5]), float("nan")), "holds NaN"),
    "infinity": ("lora_bias", lambda v: v / 0, "lora_B.bias' holds NaN or infinity"),
    "norm": ("lora_bias", lambda v: v * 1e7, "lora_B.bias' has the norm"),
    "magnitude": ("use_dora", lambda v: v * 1e7, "lora_magnitude_vector' has the norm"),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_beside_the_factors_are_checked_as_they_are(tmp_path: Path, kind: str) -> None:
    setting, edit, message = VECTORS[kind]
    name = f"{Q0}.{'lora_B.bias' if setting == 'lora_bias' else 'lora_magnitude_vector'}"
    family = "qwen2" if setting == "lora_bias" else "llama"  # the first has biases
    save_adapter(tmp_path, family, **{setting: True})
    module = read_adapter(tmp_path).modules[Q0.removeprefix("base_model.model.")]
    assert (module.bias is None) is (setting == "use_dora")
    assert (module.magnitude is None) is (setting == "lora_bias")
    edit_tensors(tmp_path, lambda t: t.update({name: edit(t[name])}))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"has no .* but {setting} is True"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("end", [".weight", ".default", ".default.weight"])
def test_state_dicts_name_magnitudes_otherwise(tmp_path: Path, end: str) -> None:
    save_adapter(tmp_path, use_dora=True)
    expected = read_adapter(tmp_path).modules
    adapter = ".default" if "default" in end else ""

    def rename(name: str) -> str:
        name = name.replace("magnitude_vector", f"magnitude_vector{end}")
        return re.sub(r"(lora_[AB])\.", rf"\1{adapter}.", name)

    edit_tensors(tmp_path, _renamed(rename))
    for name, module in read_adapter(tmp_path).modules.items():
        magnitude = expected[name].magnitude
        assert magnitude is not None
        assert module.magnitude is not None
        assert torch.equal(module.magnitude, magnitude)


def test_a_rank_above_the_cap_is_refused_before_values_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(tmp_path, r=9)
    assert next(iter(read_adapter(tmp_path, max_rank=9).modules.values())).rank == 9
    monkeypatch.setattr(peft_files, "map_tensors", None)
    with pytest.raises(CheckpointError, match="has rank 9, at most 8 are loaded"):
        read_adapter(tmp_path, max_rank=8)


def test_a_rank_of_the_config_alone_allocates_nothing(adapter: Path) -> None:
    edit_config(adapter, r=2_000_000_000)
    with pytest.raises(CheckpointError, match="gives 2000000000"):
        read_adapter(adapter)


def test_a_header_that_claims_too_much_is_refused(adapter: Path) -> None:
    entry = {"dtype": "F32", "shape": [512, 10**15], "data_offsets": [0, 2048 * 10**15]}
    text = json.dumps({A: entry}).encode()
    (adapter / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_adapter(adapter)


def test_the_size_of_the_header_is_bounded(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (size,) = struct.unpack("<Q", (adapter / TENSORS).read_bytes()[:8])
    monkeypatch.setattr(peft_files, "MAX_HEADER", size)
    assert read_adapter(adapter).modules
    monkeypatch.setattr(peft_files, "MAX_HEADER", size - 1)
    with pytest.raises(CheckpointError, match="claims a header of"):
        read_adapter(adapter)


def test_too_many_tensors_are_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_keys, "MAX_TENSORS", 7)
    with pytest.raises(CheckpointError, match="holds 8 tensors"):
        read_adapter(adapter)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_links_are_not_followed(adapter: Path, tmp_path: Path, name: str) -> None:
    (adapter / name).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        read_adapter(adapter)
    (adapter / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a link"):
        read_adapter(adapter)


def test_what_is_no_file_is_refused(adapter: Path) -> None:
    (adapter / TENSORS).unlink()
    os.mkfifo(adapter / TENSORS)
    with pytest.raises(CheckpointError, match=f"has no {TENSORS}"):
        read_adapter(adapter)
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_adapter(adapter / CONFIG)


def test_only_safetensors_are_read(adapter: Path) -> None:
    tensors = (adapter / TENSORS).read_bytes()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert read_adapter(adapter).notes == ("adapter_model.bin was not read",)
    (adapter / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"can run code .* save it again"):
        read_adapter(adapter)
    (adapter / TENSORS).write_bytes(tensors)
    assert read_adapter(adapter).modules


def test_nothing_is_imported_because_a_config_says_so(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "X", "parent_library": "hostile_module"}
    edit_config(adapter, auto_mapping=mapping, megatron_core="hostile_module")
    assert read_adapter(adapter).modules
    edit_config(adapter, megatron_config={"a": 1})
    with pytest.raises(ConfigError, match="megatron_config"):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"target_modules": ["q_proj"]}, "target_modules do not name adapted .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "no tensors for .* o_proj"),
        ({"target_modules": r".*\.q_proj"}, "target_modules do not name adapted .*v_proj"),
        ({"target_modules": ["proj"]}, "do not name adapted .* and 1 more"),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules name adapted .*v_proj"),
        ({"layers_to_transform": [0]}, "layers_to_transform do not include adapted .*layers.1"),
        ({"layers_to_transform": [0, 1, 7]}, "no tensors for layers_to_transform 7"),
        ({"layers_to_transform": 0}, "layers_to_transform do not include"),
    ],
)
def test_targets_come_from_the_tensors_and_differences_are_named(
    adapter: Path, settings: dict[str, object], note: str
) -> None:
    before = read_adapter(adapter)
    assert not before.notes
    edit_config(adapter, **settings)
    found = read_adapter(adapter)
    assert set(found.modules) == set(before.modules)
    assert any(re.search(note, line) for line in found.notes), found.notes


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR", None, r".*_proj"])
def test_targets_that_agree_or_say_nothing_have_no_note(adapter: Path, targets: object) -> None:
    edit_config(adapter, target_modules=targets, layers_to_transform=[0, 1])
    assert not read_adapter(adapter).notes


def test_an_expert_that_does_nothing_is_named(adapter: Path) -> None:
    edit_tensors(adapter, lambda t: t[B].zero_())
    (note,) = read_adapter(adapter).notes
    assert note == "the update is zero at model.layers.0.self_attn.q_proj"


def test_what_was_read_is_described(adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="org/base", revision="abc", fan_in_fan_out=True)
    found = read_adapter(adapter)
    assert (found.base, found.revision, found.fan_in_fan_out) == ("org/base", "abc", True)
    assert found.source == adapter
    assert len(found.sha256) == 64


def test_messages_hold_no_control_characters(adapter: Path) -> None:
    tensors = {"\x1b[2J\u202e.lora_A.weight": torch.ones(2, 2)}
    save_file(tensors, adapter / TENSORS)
    with pytest.raises(MoLoRAError) as caught:
        read_adapter(adapter)
    assert str(caught.value).isprintable()

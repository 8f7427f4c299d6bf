"""`molora inspect`: what is in a mixture, and that damage is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_models import save_adapter

import molora as package
from molora.cli.inspect import Bank, allocation_table, banks_of, parameters_by_role


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(adapter, tmp_path / "copy")


def tensor_file(directory: Path) -> Path:
    (found,) = directory.glob("*.safetensors")
    return found


def test_inspect_shows_method_base_parameters_files_and_experts(
    molora: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    config = package.presets.mixlora(num_experts=[2, 3], rank=2, targets="ffn")
    directory = save_adapter(tmp_path / "mixlora", base, config)
    outcome = molora("inspect", directory)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    facts = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[:6]}
    assert facts["method"].startswith("mixlora (format 1, written by molora ")
    assert facts["base"] == str(base)
    assert facts["sites"] == "14 linears with experts, 2 routers"
    # gate, up (32 → 40) and down (40 → 32) with 2 and 3 experts; q (32 → 48), k, v (32 → 24) and
    # o (48 → 32) of both layers with one, all of rank 2
    ffn, attention = 5 * 2 * 3 * (32 + 40), 2 * 2 * (80 + 56 + 56 + 80)
    assert facts["experts"] == f"{ffn + attention:,} parameters"
    assert facts["router"] == f"{5 * 32} parameters"
    assert facts["all"] == f"{ffn + attention + 5 * 32:,} parameters"
    files = [line for line in lines if line.startswith("file")]
    assert len(files) == 2
    assert f"{tensor_file(directory).name}, {tensor_file(directory).stat().st_size:,} b" in files[1]
    attention_names = "self_attn: k_proj o_proj q_proj v_proj"
    assert [line.split(maxsplit=1) for line in lines[lines.index("") + 2 :]] == [
        ["model.layers.0", "2×2           mlp: down_proj gate_proj up_proj"],
        ["1×2", attention_names],
        ["model.layers.1", "3×2           mlp: down_proj gate_proj up_proj"],
        ["1×2", attention_names],
    ]


def test_equal_layers_are_one_line_in_numeric_order() -> None:
    banks = [Bank(f"h.{layer}.a.q", 2 if layer < 10 else 4, (8,)) for layer in (10, 2, 1, 0, 11, 9)]
    assert allocation_table([*banks, Bank("head", 1, (4, 8))]) == [
        "layer    experts×rank  linears",
        "-        1×4+8         head",
        "h.0–2    2×8           a: q",
        "h.9      2×8           a: q",
        "h.10–11  4×8           a: q",
    ]


def test_blocks_of_a_bank_and_roles_are_told_by_the_names() -> None:
    shapes = {
        "a.experts.lora_A": (2, 3, 5),
        "a.experts.lora_B": (2, 7, 3),
        "a.experts.1.lora_A": (1, 4, 5),
        "a.experts.1.lora_B": (1, 7, 4),
        "a.router.weight": (3, 5),
        "head.weight": (2, 2),
    }
    assert banks_of(shapes) == [Bank("a", 3, (3, 4))]
    counts = {"experts": 30 + 42 + 20 + 28, "router": 15, "other": 4, "all": 139}
    assert parameters_by_role(shapes) == counts
    assert "other" not in parameters_by_role({"a.router.weight": (3, 5)})


def flip_a_byte(directory: Path) -> None:
    path = tensor_file(directory)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_short(directory: Path) -> None:
    path = tensor_file(directory)
    path.write_bytes(path.read_bytes()[:-8])


def break_json(directory: Path) -> None:
    (directory / "molora.json").write_text("{", encoding="utf-8")


def edit_json(directory: Path) -> None:
    path = directory / "molora.json"
    text = path.read_text(encoding="utf-8")
    assert '"mola"' in text
    path.write_text(text.replace('"mola"', '"molo"'), encoding="utf-8")


def remove_tensors(directory: Path) -> None:
    tensor_file(directory).unlink()


def remove_everything(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "SHA-256"),
        (cut_short, "truncated"),
        (break_json, "molora.json"),
        (edit_json, "molora.json"),
        (remove_tensors, "has no"),
        (remove_everything, "is not a directory"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_exit_code_2_and_named(
    molora: Callable[..., Any], copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    assert molora("inspect", copy).code == 0
    damage(copy)
    outcome = molora("inspect", copy)
    assert outcome.code == 2
    assert outcome.out == ""
    assert message in outcome.err
    assert outcome.err.count("Error") == 1

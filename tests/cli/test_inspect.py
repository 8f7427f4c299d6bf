"""`molora inspect`: what is in a mixture, and that damage is found."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_models import save_adapter

import molora as package
from molora.cli.backends import routing_of, targets
from molora.cli.inspect import Bank, allocation_table, banks_of, parameters_by_role
from molora.kernels.calibration import Calibration, Line, shipped, user_file


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
    first = lines.index("")
    allocation = lines[first + 2 : lines.index("", first + 1)]
    assert [line.split(maxsplit=1) for line in allocation] == [
        ["model.layers.0", "2×2           mlp: down_proj gate_proj up_proj"],
        ["1×2", attention_names],
        ["model.layers.1", "3×2           mlp: down_proj gate_proj up_proj"],
        ["1×2", attention_names],
    ]


def test_equal_layers_are_one_line_in_numeric_order() -> None:
    banks = [Bank(f"h.{layer}.a.q", 2 if layer < 10 else 4, (8,)) for layer in (10, 2, 1, 0, 11, 9)]
    assert allocation_table([*banks, Bank("head", 3, (8, 4), sizes=(1, 2))]) == [
        "layer    experts×rank  linears",
        "-        2×4 + 1×8     head",
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
    expected = Bank("a", 3, (3, 4), in_features=5, out_features=7, sizes=(2, 1))
    assert banks_of(shapes) == [expected]
    shared = {"a.experts.lora_A": (1, 3, 5), "a.experts.lora_B": (2, 7, 3)}
    assert [bank.shared_A for bank in banks_of(shared)] == [True]
    counts = {"experts": 30 + 42 + 20 + 28, "router": 15, "other": 4, "all": 139}
    assert parameters_by_role(shapes) == counts
    assert "other" not in parameters_by_role({"a.router.weight": (3, 5)})


def test_inspect_tells_what_auto_is_when_training_and_when_decoding(
    molora: Callable[..., Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    config = package.presets.mixlora(num_experts=4, rank=2, targets="ffn")
    directory = save_adapter(tmp_path / "mixlora", base, config)
    lines = molora("inspect", directory).out.splitlines()
    heading = lines.index("backend  auto, which is for float32 on cpu:")
    table = [re.split(r" {2,}", line) for line in lines[heading + 1 :]]
    assert table[0] == [
        *("width", "experts×rank", "4096 rows, training", "1 row, decoding", "linears")
    ]
    kinds = {(*row[:2], row[4]) for row in table[1:]}
    assert ("32 to 40", "2 of 4×2", "mlp: gate_proj up_proj") in kinds
    assert ("40 to 32", "2 of 4×2", "mlp: down_proj") in kinds
    assert ("32 to 48", "all of 1×2", "self_attn: q_proj") in kinds
    picked = {backend for row in table[1:] for cell in row[2:4] for backend in cell.split("+")}
    assert picked <= {"dense", "grouped", "gather"}


def test_inspect_follows_the_users_figures(
    molora: Callable[..., Any], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    found = shipped().devices["cpu"]
    dtype = found.dtypes["float32"]
    # grouped takes no time, however many rows there are
    free = {k: Line(0, 0, 0) if k[1] == "grouped" else line for k, line in dtype.lines.items()}
    figures = replace(found, dtypes={"float32": replace(dtype, lines=free)})
    before = molora("inspect", adapter).out
    Calibration({"cpu": figures}).save(user_file())
    after = molora("inspect", adapter).out
    assert {"dense", "gather"} & set(before.partition("backend")[2].split())
    assert not {"dense", "gather"} & set(after.partition("backend")[2].split())


def test_inspect_names_a_backend_that_was_chosen(
    molora: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    config = package.presets.mola(num_experts=2, rank=2)
    config = config.model_copy(update={"backend": "dense"})
    outcome = molora("inspect", save_adapter(tmp_path / "dense", base, config))
    assert outcome.out.splitlines()[-1] == "backend  dense"


@pytest.mark.parametrize(
    ("select", "acting"),
    [
        (package.config.TopK(k=2), (2, 2)),
        (package.config.TopK(k=[2, 3]), (2, 3)),
        (package.config.Dense(), (None, None)),
    ],
    ids=["top_k", "top_k_by_layer", "dense"],
)
def test_how_many_experts_act_is_told_by_the_configuration(
    select: Any, acting: tuple[int | None, int | None]
) -> None:
    group = package.config.Group(targets="q_proj", select=select, num_experts=4)
    config = package.config.MixtureConfig(groups=(group,))
    banks = [Bank(f"model.layers.{layer}.self_attn.q_proj", 4, (2,)) for layer in (0, 1)]
    assert tuple(routing_of(bank, config, depth=2)[1] for bank in banks) == acting
    alone = Bank("model.layers.0.self_attn.q_proj", 1, (2,))
    assert routing_of(alone, config, depth=2) == ("lora_mix", None)


@pytest.mark.parametrize(
    ("pattern", "path", "named"),
    [
        ("all", "h.0.attn.q", True),
        ("attention", "h.0.attn.q", True),
        ("ffn", "h.0.attn.q", False),
        ("ffn", "h.0.mlp.up", True),
        ("q", "h.0.attn.q", True),
        ("attn.q", "h.0.attn.q", True),
        ("q", "h.0.attn.qq", False),
        ("re:.*q", "h.0.attn.qq", True),
        ("re:q", "h.0.attn.q", False),
    ],
)
def test_a_group_is_found_by_the_path_of_a_linear(pattern: str, path: str, named: bool) -> None:
    assert targets(package.config.Group(targets=pattern), path) is named


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

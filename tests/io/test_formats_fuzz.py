"""Damaged files of other programs: what was read before, or a MoLoRAError."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_adapters import CONFIG, TENSORS, save_adapter
from safetensors.torch import save_file

from molora import MoLoRAError
from molora.io import formats

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "../a", "/", "\0", 2, 0.5, "softmax"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
XLORA = {
    "peft_type": "XLORA",
    "hidden_size": 4,
    "adapters": {"0": "a", "1": "a"},
    "top_k_lora": 1,
    "layerwise_scalings": True,
    "xlora_depth": 2,
    "xlora_size": 3,
    "xlora_dropout_p": 0.0,
    "enable_softmax": True,
    "softmax_temperature": 1.0,
    "scaling_pass_value": 0.0,
}
AUTHORS = {key: value for key, value in XLORA.items() if key != "peft_type"}
ARROW = {"peft_type": "LORA", "arrow_config": {"top_k": 2, "router_temperature": 1.0}}
MERGOO = {
    "num_experts_per_tok": 1,
    "base_model": "b",
    "router_layers": ["q"],
    "experts": [{"expert_name": "a", "model_id": "x"}],
    "router_layers_index": [1],
}
LORAHUB = {"modules": ["a", "b"], "weights": [0.5, 1]}
# file with the settings, what it holds, and what reads the directory
SETTINGS: dict[str, tuple[str, dict[str, Any], Callable[[Path], object]]] = {
    "xlora": (CONFIG, XLORA, formats.read_xlora),
    "authors": ("xlora_config.json", AUTHORS, formats.read_xlora),
    "arrow": (CONFIG, ARROW, formats.read_arrow),
    "mergoo": ("m.json", MERGOO, lambda path: formats.read_mergoo(path / "m.json")),
    "lorahub": ("w.json", LORAHUB, lambda path: formats.read_lorahub_weights(path / "w.json")),
}
TENSOR_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "xlora": (TENSORS, formats.read_xlora),
    "gates": ("phatgoose_gates.safetensors", formats.read_gate_vectors),
    "kohya": ("k", lambda path: formats.read_kohya(path / "k", modules=["m.q"])),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file that is read here, and an adapter inside."""
    path = tmp_path_factory.mktemp("formats") / "whole"
    save_adapter(path / "a")
    layers = {"0": (3, 4), "2": (8, 3)}
    prefix = "base_model.internal_xlora_classifier.layers."
    sizes = {f"{prefix}{n}.weight": size for n, size in layers.items()}
    sizes |= {f"{prefix}{n}.bias": size[:1] for n, size in layers.items()}  # type: ignore[misc]
    save_file({name: torch.randn(size) for name, size in sizes.items()}, path / TENSORS)
    theirs = {
        "inner.0.weight": (3, 4),
        "inner.0.bias": (3,),
        "last.weight": (8, 3),
        "last.bias": (8,),
    }
    tensors = {name: torch.randn(size) for name, size in theirs.items()}
    save_file(tensors, path / "xlora_classifier.safetensors")
    formats.write_gate_vectors(path, {"m.q": torch.randn(4)})
    down, up = torch.randn(2, 4), torch.randn(5, 2)
    kohya = {"lora_te_m_q.lora_down.weight": down, "lora_te_m_q.lora_up.weight": up}
    save_file({**kohya, "lora_te_m_q.alpha": torch.tensor(2.0)}, path / "k")
    return path


def _read(path: Path, read: Callable[[Path], object]) -> str:
    try:
        read(path)
    except MoLoRAError as error:
        message = str(error)
    else:
        return "read"
    assert message.replace("\n", "").isprintable()
    return "refused"


@pytest.mark.parametrize("kind", SETTINGS)
def test_any_json_anywhere_in_settings(directory: Path, tmp_path: Path, kind: str) -> None:
    name, whole, read = SETTINGS[kind]
    shutil.copytree(directory, tmp_path / "x")
    counts: Counter[str] = Counter()

    def write(data: object) -> None:
        (tmp_path / "x" / name).write_text(json.dumps(data))

    write(whole)
    assert _read(tmp_path / "x", read) == "read"

    @given(share=st.floats(0, 1, exclude_max=True), value=JSON, key=st.none() | st.text(max_size=9))
    def check(share: float, value: object, key: str | None) -> None:
        old = list(whole)[int(share * len(whole))]
        write({**whole, (key or old): value})
        counts[_read(tmp_path / "x", read)] += 1
        nested = whole[old]
        if isinstance(nested, dict) and nested:
            write({**whole, old: {**nested, next(iter(nested)): value}})
            _read(tmp_path / "x", read)
        write(value)
        _read(tmp_path / "x", read)

    check()
    assert counts["refused"] > 2


@pytest.mark.parametrize("kind", TENSOR_FILES)
def test_any_byte_of_tensors(directory: Path, tmp_path: Path, kind: str) -> None:
    name, read = TENSOR_FILES[kind]
    shutil.copytree(directory, tmp_path / "x")
    (tmp_path / "x" / CONFIG).write_text(json.dumps(XLORA))
    whole = (directory / name).read_bytes()
    assert _read(tmp_path / "x", read) == "read"
    counts: Counter[str] = Counter()

    @given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), cut=st.booleans())
    def check(share: float, mask: int, cut: bool) -> None:
        place = int(share * len(whole))
        damaged = bytearray(whole[: place + 1] if cut else whole)
        damaged[place] ^= mask
        (tmp_path / "x" / name).write_bytes(damaged)
        counts[_read(tmp_path / "x", read)] += 1

    check()
    assert counts["refused"] > 2

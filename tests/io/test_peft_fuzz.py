"""Whatever is in a directory: a loaded expert or a MoLoRAError, and the files as they were."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_adapters import CONFIG, TENSORS, edit_config, save_adapter
from saved_mixtures import join_header, split_header

from molora import MoLoRAError, load_experts
from molora.io import peft_patterns
from molora.io.header import read_header
from molora.io.peft_config import REFUSED, REPLACING, WITHOUT_EFFECT, AdapterConfig

Files = dict[str, bytes]
SHARES = st.floats(0, 1, exclude_max=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
REGEXES = st.text(st.sampled_from("qv_proj.*+?()[]|\\d{}0123^$"), max_size=12)
PLAUSIBLE = (
    st.integers(1, 9)
    | st.sampled_from([True, False, "all-linear", "none", "pissa", "gaussian", ["q_proj"], [0, 1]])
    | REGEXES
    | st.lists(REGEXES, max_size=3)
    | st.dictionaries(REGEXES, st.integers(1, 5) | st.floats(), max_size=4)
)
KEYS = st.sampled_from(sorted({*AdapterConfig.model_fields, *REFUSED, *REPLACING, *WITHOUT_EFFECT}))
NAMES = st.text(max_size=12) | st.lists(
    st.sampled_from(
        ["base_model", "model", "lora_A", "lora_B", "weight", "default", "", "..", "q"]
    ),
    max_size=6,
).map(".".join)
SIZES = st.integers(-1, 50) | st.integers(2**31, 2**80)


def _set_config(key: str, value: object) -> Callable[[Path], None]:
    def mutate(directory: Path) -> None:
        edit_config(directory, **{key: value})

    return mutate


def _flip(name: str, share: float, mask: int) -> Callable[[Path], None]:
    def mutate(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        if data:
            data[int(share * len(data))] ^= mask
        (directory / name).write_bytes(data)

    return mutate


def _cut(name: str, share: float) -> Callable[[Path], None]:
    def mutate(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(share * len(data))])

    return mutate


def _edit_entry(share: float, key: str, value: object) -> Callable[[Path], None]:
    """One tensor's entry in the header, or with the key "name" what it is called."""

    def mutate(directory: Path) -> None:
        header, values = split_header(directory / TENSORS)
        names = [name for name in header if name != "__metadata__"]
        name = names[int(share * len(names))]
        if key == "name":
            header[str(value)] = header.pop(name)
        else:
            header[name] = {**header[name], key: value}
        join_header(directory / TENSORS, json.dumps(header), values)

    return mutate


FILE_NAMES = st.sampled_from([CONFIG, TENSORS])
MASKS = st.integers(1, 255)
CONTENT = st.one_of(
    st.builds(_set_config, KEYS, PLAUSIBLE),
    st.builds(_set_config, KEYS | st.text(max_size=8), JSON),
    st.builds(_flip, FILE_NAMES, SHARES, MASKS),
    st.builds(_flip, st.just(TENSORS), SHARES.map(lambda share: share / 8), MASKS),
    st.builds(_cut, FILE_NAMES, SHARES),
)
ENTRIES = st.one_of(
    st.builds(_edit_entry, SHARES, st.just("name"), NAMES),
    st.builds(_edit_entry, SHARES, st.just("shape"), st.lists(SIZES, max_size=3)),
    st.builds(_edit_entry, SHARES, st.just("dtype"), st.sampled_from(["F16", "I32", "F64", "?"])),
    st.builds(_edit_entry, SHARES, st.just("data_offsets"), st.lists(SIZES, max_size=3)),
    st.builds(_edit_entry, SHARES, st.sampled_from(["shape", "dtype", "other"]), JSON),
)
# what a header is edited to be comes first: after other damage it may be no header any more
MUTATIONS = st.tuples(st.lists(ENTRIES, max_size=1), st.lists(CONTENT, max_size=2))
TREES = st.sampled_from(["as it is"] * 8 + ["lacks", "link", "folder", "pipe", "bin"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("peft")
    save_adapter(directory, alpha_pattern={"q_proj": 4, "v_proj": 2})
    return {name: (directory / name).read_bytes() for name in (CONFIG, TENSORS)}


def _replace(path: Path, tree: str) -> None:
    if tree in ("lacks", "link", "folder", "pipe"):
        path.unlink()
    if tree == "link":
        path.symlink_to("/dev/zero")
    elif tree == "folder":
        path.mkdir()
    elif tree == "pipe":
        os.mkfifo(path)
    elif tree == "bin":
        (path.parent / "adapter_model.bin").write_bytes(b"no")


def _content(directory: Path) -> dict[str, bytes | None]:
    plain = {p.name: p.is_file() and not p.is_symlink() for p in directory.iterdir()}
    return {name: (directory / name).read_bytes() if is_plain else None
            for name, is_plain in plain.items()}  # fmt: skip


def _outcome(directory: Path) -> str:
    """Which of the two it ended in; another exception is the test's failure."""
    try:
        experts = load_experts({"one": directory})
    except MoLoRAError:
        return "refused"
    for module in experts.adapters["one"].modules.values():
        assert module.lora_A.shape[0] == module.lora_B.shape[1] == module.rank <= 512
        assert bool(torch.isfinite(module.lora_A).all() and torch.isfinite(module.lora_B).all())
        assert math.isfinite(module.scaling)
        assert math.isfinite(module.update_norm)
    return "loaded"


def _has_header(directory: Path) -> bool:
    try:
        return bool(read_header(directory / TENSORS))
    except (MoLoRAError, OSError, ValueError):
        return False


def _search(files: Files, examples: int) -> dict[str, int]:
    counts = {"loaded": 0, "refused": 0, "header": 0, "all": 0}

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations=MUTATIONS, tree=TREES, name=FILE_NAMES)
    def check(mutations: tuple[list[Any], list[Any]], tree: str, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            for file, data in files.items():
                (directory / file).write_bytes(data)
            for mutate in (*mutations[0], *mutations[1]):
                with contextlib.suppress(ValueError, TypeError):  # of what is no JSON any more
                    mutate(directory)
            _replace(directory / name, tree)
            before = _content(directory)
            counts[_outcome(directory)] += 1
            counts["all"] += 1
            if before.get(TENSORS) is not None:
                counts["header"] += _has_header(directory)
            assert _content(directory) == before

    check()
    return counts


def _assert_both_happened(counts: dict[str, int]) -> None:
    """And enough of the files came past the header to test what follows it."""
    assert counts["header"] >= counts["all"] / 5
    assert counts["loaded"] >= counts["all"] / 20
    assert counts["refused"] >= counts["all"] / 5


def test_a_mutated_directory_is_loaded_or_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_patterns, "TIME_LIMIT", 1.0)
    _assert_both_happened(_search(files, 150))


@pytest.mark.slow
def test_many_mutated_directories_are_loaded_or_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_patterns, "TIME_LIMIT", 1.0)
    _assert_both_happened(_search(files, 3000))

"""Twenty thousand damaged directories: a loaded expert or a MoLoRAError, soon and in little memory.

Hypothesis looks for small examples in `test_peft_fuzz.py`; here plain random numbers try as many as
three minutes hold, of every kind of adapter that is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft_adapters import CONFIG, TENSORS, save_adapter

from molora import MoLoRAError, load_experts
from molora.io import peft_patterns
from molora.io.adapter import AdapterModule
from molora.io.header import read_header
from molora.io.peft_config import REFUSED, REPLACING, WITHOUT_EFFECT, AdapterConfig
from molora.io.peft_values import MAX_NORM

CASES = 20_000
SECONDS = 20
"""For one case, which takes milliseconds."""
MEMORY = 2**30
"""Bytes that one case may add to the process, whose adapters have a few thousand."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"alpha_pattern": {"q_proj": 4, "v_proj": 2}}),
    "biases": ("qwen2", {"lora_bias": True, "alora_invocation_tokens": [3, 4]}),
    "dora": ("llama", {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "regex": ("llama", {"target_modules": r".*\.[qv]_proj"}),
    "stacked": (
        "qwen3_moe",
        {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}
SETTINGS = sorted({*AdapterConfig.model_fields, *REFUSED, *REPLACING, *WITHOUT_EFFECT})
DECISIVE = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_parameters"] * 8
"""Settings that decide how tensors are read: each as often as eight others."""
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 5, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320),
    *(math.nan, math.inf, "", "none", "all", "all-linear", "q_proj", "pissa", "olora", "loftq"),
    *("\x00", "\x1b[2J", "a" * 600, "../..", [], [3], [3, 4], ["q_proj"], ["q_proj", "v_proj"]),
    *([-1], [[]], [None], {}, {"q_proj": 2}, {"q_proj": -1}, {"q_proj": None}, {"": 1}, {"(": 1}),
    *(["mlp.experts.down_proj"], ["down_proj"], {"layers.0": 4, "q_proj": 3}, {"v_proj": 3.5}),
]
REGEXES = [
    "(a+)+$",
    ".*",
    "(q|k|v)_proj",
    r".*\.layers\.[01]\..*",
    "(",
    "[",
    "(?P<x>",
    "a{9999999}",
]
DTYPES = ["F16", "BF16", "F32", "F64", "I8", "I64", "BOOL", "F8_E4M3", "", 3]
NAMES = [
    *("", "..", "a/../b", "__metadata__", "x.lora_A.weight", "base_model.model.x.lora_B.weight"),
    *("lora_A.weight", "base_model.model.lm_head.weight", "a" * 600, "\x1b[2J", "é.lora_A.weight"),
    *("base_model.model.x.base_layer.lora_A.weight", "base_model.model.e.lora_embedding_A"),
    *("base_model.model.x.lora_magnitude_vector", "base_model.model.x.lora_B.bias"),
]
RENAMED = [
    *[("lora_A", "lora_B"), ("layers.0", "layers.1"), ("weight", "bias"), ("q_", "v_")],
    *[(".weight", ".default.weight"), ("model.", ""), ("lora_", "base_layer.lora_")],
]
FLOATS = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e30, 1e-45, 0.0]
TREES = ["lacks", "link", "link back", "folder", "pipe", "empty", "huge", "bin"]
Header = dict[str, Any]


class _TooLong(BaseException):
    """Not an Exception: nothing that is tested may catch it."""


class _Damage:
    """Random damage to the two files of an adapter, in place."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def apply(self, directory: Path) -> None:
        kinds = [self.settings, self.entry, self.bytes, self.values, self.cut, self.length]
        for damage in self.random.choices(
            kinds, weights=[6, 5, 3, 3, 1, 1], k=self.random.choice([1, 1, 2, 3])
        ):
            with contextlib.suppress(
                ValueError, TypeError, AttributeError, IndexError, struct.error
            ):
                damage(directory)  # what was damaged before may be no JSON or no header any more
        if self.random.random() < 0.1:
            self.tree(directory)

    def settings(self, directory: Path) -> None:
        data = json.loads((directory / CONFIG).read_text())
        value = self.random.choice(VALUES)
        if self.random.random() < 0.02:  # each of them costs a process
            value = self.random.choice(REGEXES)
            value = self.random.choice([value, {value: 3}, [value]])
        roll = self.random.random()
        if roll < 0.1:
            data.pop(self.random.choice(list(data)))
        elif roll < 0.15:
            data["".join(self.random.choices("abuse_config_", k=9))] = value
        else:
            data[self.random.choice([*SETTINGS, *DECISIVE])] = value
        (directory / CONFIG).write_text(json.dumps(data))

    def entry(self, directory: Path) -> None:
        data = (directory / TENSORS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header: Header = json.loads(data[8 : 8 + length])
        name = self.random.choice([n for n in header if n != "__metadata__"])
        roll = self.random.random()
        if roll < 0.25:
            other = self.random.choice(NAMES)
            if self.random.random() < 0.5:
                old, new = self.random.choice(RENAMED)
                other = name.replace(old, new)
            header[other] = header.pop(name)
        elif roll < 0.35:
            header.pop(name)
        elif roll < 0.55:
            header[name]["dtype"] = self.random.choice(DTYPES)
        elif roll < 0.8:
            shape = header[name]["shape"]
            change = [shape[::-1], shape[:-1], [*shape, 1], [math.prod(shape)], [-x for x in shape]]
            header[name]["shape"] = self.random.choice([*change, [0], [2**62, 4], "x", [1.5], [[]]])
        else:
            offsets = header[name]["data_offsets"]
            shift = self.random.choice([4, -4, 2**40, 10**30])
            header[name]["data_offsets"] = self.random.choice(
                [[x + shift for x in offsets], offsets[::-1], offsets[:1], None, [0, 0]]
            )
        text = json.dumps(header).encode()
        (directory / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    def bytes(self, directory: Path) -> None:
        path = directory / self.random.choice([CONFIG, TENSORS, TENSORS])
        data = bytearray(path.read_bytes())
        end = len(data) // self.random.choice([1, 4, 40])
        for _ in range(self.random.choice([1, 1, 2, 8])):
            data[self.random.randrange(end)] = self.random.randrange(256)
        path.write_bytes(data)

    def values(self, directory: Path) -> None:
        data = bytearray((directory / TENSORS).read_bytes())
        start = 8 + struct.unpack("<Q", data[:8])[0]
        place = start + 4 * self.random.randrange((len(data) - start) // 4)
        data[place : place + 4] = struct.pack("<f", self.random.choice(FLOATS))
        (directory / TENSORS).write_bytes(data)

    def cut(self, directory: Path) -> None:
        path = directory / self.random.choice([CONFIG, TENSORS])
        data = path.read_bytes()
        more = self.random.randbytes(self.random.randrange(1, 64))
        shorter = data[: self.random.randrange(len(data))]
        path.write_bytes(shorter if self.random.random() < 0.7 else data + more)

    def length(self, directory: Path) -> None:
        data = (directory / TENSORS).read_bytes()
        claims = [0, 1, 2**25, 2**25 + 1, 2**63, 2**64 - 1, len(data), len(data) - 8]
        claimed = struct.pack("<Q", self.random.choice(claims))
        (directory / TENSORS).write_bytes(claimed + data[8:])

    def tree(self, directory: Path) -> None:
        path, tree = directory / self.random.choice([CONFIG, TENSORS]), self.random.choice(TREES)
        data = path.read_bytes()
        path.unlink()
        if tree == "link":
            path.symlink_to(self.random.choice(["/dev/zero", "/etc/passwd", path.name, "nowhere"]))
        elif tree == "link back":
            (directory / "elsewhere").write_bytes(data)
            path.symlink_to("elsewhere")
        elif tree == "folder":
            path.mkdir()
        elif tree == "pipe":
            os.mkfifo(path)
        elif tree == "empty":
            path.write_bytes(b"")
        elif tree == "huge":  # of holes, which take no room
            with path.open("wb") as file:
                file.write(data)
                file.truncate(2**33)
        elif tree == "bin":
            (directory / "adapter_model.bin").write_bytes(data)


@contextlib.contextmanager
def _watched() -> Iterator[Callable[[], None]]:
    """Ends a case that takes too long or too much memory; gives what starts the clock anew."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def _refusal(error: MoLoRAError) -> tuple[str, int]:
    """The place in molora that refused."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return Path(trace.tb_frame.f_code.co_filename).name, trace.tb_lineno


def _checked(part: Any) -> None:
    assert math.isfinite(part.scaling)
    assert 0 <= part.update_norm <= MAX_NORM
    assert part.rank <= 512
    tensors = [part.lora_A, part.lora_B]
    if isinstance(part, AdapterModule):
        assert part.lora_A.shape[0] == part.lora_B.shape[1] == part.rank
        tensors += [tensor for tensor in (part.bias, part.magnitude) if tensor is not None]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _content(directory: Path) -> dict[str, bytes | None]:
    small = {p.name: p.is_file() and not p.is_symlink() and p.stat().st_size < 2**20
             for p in directory.iterdir()}  # fmt: skip
    return {name: (directory / name).read_bytes() if is_small else None
            for name, is_small in small.items()}  # fmt: skip


def _has_header(directory: Path) -> bool:
    try:
        plain = (directory / TENSORS).is_file() and not (directory / TENSORS).is_symlink()
        return plain and bool(read_header(directory / TENSORS))
    except (MoLoRAError, OSError):
        return False


def _search(root: Path, cases: int) -> tuple[Counter[str], set[tuple[str, int]]]:
    originals = []
    for kind, (family, settings) in KINDS.items():
        save_adapter(root / kind, family, **settings)
        files = {name: (root / kind / name).read_bytes() for name in (CONFIG, TENSORS)}
        originals.append(files)
    counts: Counter[str] = Counter()
    places: set[tuple[str, int]] = set()
    damaged = root / "damaged"
    with _watched() as start_clock:
        for case in range(cases):
            damaged.mkdir()
            # a regex costs a process each time
            chosen = -1 if case % 80 == 0 else case % (len(originals) - 1)
            for name, data in originals[chosen].items():
                (damaged / name).write_bytes(data)
            _Damage(case).apply(damaged)
            before = _content(damaged)
            counts["header"] += _has_header(damaged)
            start_clock()
            try:
                experts = load_experts({"one": damaged}, leave_out=case % 3 == 0)
                adapter = experts.adapters["one"]
            except MoLoRAError as error:
                counts["refused"] += 1
                places.add(_refusal(error))
                if not str(error).replace("\n", "").isprintable():
                    raise AssertionError(f"case {case} has control characters") from error
            except BaseException as error:
                raise AssertionError(f"case {case} ended in {type(error).__name__}") from error
            else:
                counts["loaded"] += 1
                for part in (*adapter.modules.values(), *adapter.parameters.values()):
                    _checked(part)
                del experts, adapter, part
            assert _content(damaged) == before, case
            shutil.rmtree(damaged)
    return counts, places


def _assert_wide(counts: Counter[str], places: set[tuple[str, int]], cases: int) -> None:
    """Enough came past the header, both ends were reached, and by many checks."""
    assert counts["loaded"] + counts["refused"] == cases
    assert counts["header"] >= cases / 5
    assert counts["loaded"] >= cases / 20
    assert counts["refused"] >= cases / 5
    assert len(places) >= min(30, cases // 40), places


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory in memory where the system has such a place: disks are what takes long here."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as path:
        yield Path(path)


def test_damaged_directories_are_loaded_or_refused(
    in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_patterns, "TIME_LIMIT", 1.0)
    _assert_wide(*_search(in_memory, 400), 400)


@pytest.mark.slow
def test_many_damaged_directories_are_loaded_or_refused(
    in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_patterns, "TIME_LIMIT", 1.0)
    _assert_wide(*_search(in_memory, CASES), CASES)

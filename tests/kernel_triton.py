"""The triton backend as the interpreter runs it, in a process that may have imported triton."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import triton  # before the interpreter is asked for: its own functions stay those of a device
from kernel_problems import LOOPS, Problem, plain_low_precision, results
from torch import Tensor

from molora.kernels import Backend

KERNELS = Path(__file__).parents[1] / "molora" / "kernels"
# in the order of their imports
FILES = (
    *("triton_tiles", "triton_rows", "triton_programs", "triton_launch", "triton_bank"),
    *("lora_mix.triton_mix", "lora_rows.triton_rows"),
)
LAYOUTS = {"as_they_come": False, "sorted": True}

assert triton.__version__


@dataclass(frozen=True)
class Interpreted:
    """A copy of the backend, whose programs run on the CPU."""

    backend: Backend
    modules: Mapping[str, ModuleType]

    @contextmanager
    def layout(self, name: str) -> Iterator[None]:
        """Rows go as they come or sorted, whatever would pay."""
        bank = self.modules["triton_bank"]
        with mock.patch.object(bank, "sorting_pays", return_value=LAYOUTS[name]):
            yield


@cache
def interpreted() -> Interpreted:
    return load({}, KERNELS)


def load(sources: Mapping[str, str], folder: Path) -> Interpreted:
    """Load the backend's files for the interpreter, some from another text that `folder` gets.

    triton decides when a function is decorated. The copies are modules of the usual names while
    they are loaded and are forgotten afterwards, so that a backend for devices can be beside them.
    """
    names = {name: f"molora.kernels.{name}" for name in FILES}
    kept = {full: sys.modules.pop(full) for full in names.values() if full in sys.modules}
    attributes = {full: _attribute(full) for full in names.values()}
    modules = {}
    try:
        with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
            for name, full in names.items():
                path = KERNELS / f"{name.replace('.', '/')}.py"
                if name in sources:
                    path = folder / f"{name}.py"
                    path.write_text(sources[name], encoding="utf-8")
                modules[name] = _load(full, path)
            modules["triton_launch"]._programs()
    finally:
        for full in names.values():
            sys.modules.pop(full, None)
            _restore(full, attributes[full])
        sys.modules.update(kept)
    mix, rows = modules["lora_mix.triton_mix"], modules["lora_rows.triton_rows"]
    return Interpreted(Backend("triton", mix.lora_mix, rows.lora_rows), modules)


def _load(full: str, path: Path) -> ModuleType:
    spec = spec_from_loader(full, SourceFileLoader(full, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    package, _, name = full.rpartition(".")
    setattr(importlib.import_module(package), name, module)
    return module


def _attribute(full: str) -> ModuleType | None:
    package, _, name = full.rpartition(".")
    return getattr(importlib.import_module(package), name, None)


def _restore(full: str, module: ModuleType | None) -> None:
    package, _, name = full.rpartition(".")
    owner = importlib.import_module(package)
    if module is not None:
        setattr(owner, name, module)
    elif hasattr(owner, name):
        delattr(owner, name)


def for_op(op: str, p: Problem) -> Problem:
    """`lora_rows` has rows of chosen experts: where none are chosen, all."""
    if p.index is None and op == "lora_rows":
        return replace(p, index=torch.arange(len(p.lora_B)).expand(len(p.x), -1))
    return p


def assert_no_worse(
    run: Callable[[Problem], Tensor], op: str, p: Problem, dtype: torch.dtype
) -> None:
    """Its errors, against float64, are at most twice those of plain torch in `dtype`."""
    low = p.to(dtype)
    exact = results(LOOPS[op], low.to(torch.float64))
    plain, fast = results(_plain(op), low), results(run, low)
    assert fast.keys() == exact.keys()
    for name, value in exact.items():
        error_fast, error_plain = (torch.norm(found[name] - value) for found in (fast, plain))
        assert error_fast <= 2 * error_plain, f"{name}: {error_fast} against {error_plain}"
        assert error_plain < 0.03 * torch.norm(value) or not len(p.x), "else this compares nothing"


def _plain(op: str) -> Callable[[Problem], Tensor]:
    def run(p: Problem) -> Tensor:
        if p.gates is None:
            index = torch.arange(len(p.lora_B)).expand(len(p.x), -1)
            p = replace(p, index=index if p.index is None else p.index)
            p = replace(p, gates=torch.ones(p.index.shape))
        return plain_low_precision(op)(p)

    return run

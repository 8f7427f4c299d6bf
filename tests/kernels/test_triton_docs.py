"""docs/kernels.md is what its script writes, and its formulas are what the kernels do."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from kernel_problems import call, problem
from kernel_triton import LAYOUTS, Interpreted, interpreted
from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BY_SLOT = ("x", "h", "out", "gates", "grad_gates")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        found = {n: importlib.import_module(n) for n in ("kernels_compiled", "kernels_cost")}
        # by its path: `kernels` is the folder of these tests too
        spec = importlib.util.spec_from_file_location(
            "kernels_page_script", BENCHMARKS / "kernels.py"
        )
        assert spec is not None
        assert spec.loader is not None
        found["kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found["kernels"])
        yield found
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_page_is_what_the_script_writes(scripts, tmp_path: Path):
    kernels = scripts["kernels"]
    page = kernels.page_text()
    assert (BENCHMARKS.parent / "docs" / "kernels.md").read_text(encoding="utf-8") == page
    # seen to depend on the binaries
    binaries = json.loads(kernels.BINARIES.read_text(encoding="utf-8"))
    binaries["rows"][0]["registers"] += 1
    changed = tmp_path / "kernels.json"
    changed.write_text(json.dumps(binaries), encoding="utf-8")
    assert kernels.page_text(changed) != page


# ------------------------------------------------------------------ formulas, by counting


class Count:
    """Bytes that one launch moves and FLOPs of its products, as the interpreter sees them."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.flops = 0
        self.by_slot = 0
        self.once: list[np.ndarray] = []
        tensors = [getattr(arguments.get(name), "at", None) for name in BY_SLOT]
        tensors.append(arguments["slots"].order)
        self.rows = [_range(tensor) for tensor in tensors if tensor is not None]

    def access(self, ptrs: Any, mask: Any) -> None:
        size = _get_np_dtype(ptrs.get_element_ty()).itemsize
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]
        if any(start <= address < end for address in addresses[:1] for start, end in self.rows):
            self.by_slot += size * len(addresses)
        else:
            self.once.append(np.stack([addresses, np.full_like(addresses, size)], axis=1))

    @property
    def bytes(self) -> int:
        once = np.unique(np.concatenate(self.once), axis=0) if self.once else np.zeros((0, 2), int)
        return self.by_slot + int(once[:, 1].sum())


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


@contextmanager
def counted(kernels: Interpreted, launch_of: Any) -> Iterator[list[tuple[Any, Count]]]:
    """Note every launch, and count while it runs."""
    programs = kernels.modules["triton_programs"]
    found: list[tuple[Any, Count]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name, self.program = name, getattr(programs, name)

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            def run(**arguments: Any) -> None:
                found.append((launch_of(self.name, arguments, grid), Count(arguments)))
                self.program[grid](**arguments)

            return run

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    dot = InterpreterBuilder.create_dot

    def counted_load(self, ptrs, mask, *rest):
        found[-1][1].access(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        found[-1][1].access(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def counted_dot(self, a, b, *rest):
        found[-1][1].flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("narrow", "widen", "outer"):
            patch.setattr(programs, name, Noted(name))
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        patch.setattr(InterpreterBuilder, "create_dot", counted_dot)
        yield found


@pytest.mark.parametrize("op", ["lora_mix", "lora_rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base", ["", "w"], ids=["update", "with_base"])
def test_bytes_and_flops_of_launches_are_those_of_the_interpreter(op, layout, base, scripts):
    """Where a tile has all columns and all of D: the formula leaves out what a cache gives."""
    cost = scripts["kernels_cost"].launch_cost
    kernels = interpreted()
    p = problem(T=128, D=64, F=64, E=4, R=4, base=base).to(torch.bfloat16)
    leaves = [t.requires_grad_() for t in (p.x, p.gates, p.lora_A, p.lora_B)]
    launch_of = scripts["kernels_compiled"].Launch
    with kernels.layout(layout), counted(kernels, launch_of) as found:
        call(kernels.backend, op)(p).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves if op == "lora_mix" or leaf is not p.gates)
    turns = {"as_they_come": 0, "sorted": {"lora_mix": 2, "lora_rows": 1}[op]}[layout]
    assert len(found) == 6 + turns
    for launch, count in found:
        expected = cost(launch)
        assert count.bytes == expected.bytes, launch.program
        if layout == "as_they_come" and launch.program != "widen":
            assert count.flops == expected.flops, launch.program
        else:  # tiles of sorted rows are filled in part, and widen's have 128 places
            assert count.flops >= expected.flops, launch.program


def test_operators_of_torch_are_counted_as_they_are_called(scripts):
    cost = scripts["kernels_cost"]
    x, weight = torch.zeros(8, 4), torch.zeros(4, 4)
    other, index = torch.zeros(4, 6), torch.tensor([0, 3])
    with cost.Counted(weight) as counted_:
        _ = x @ weight
        _ = (x @ other).view(-1)[None].expand(5, -1)
        _ = x[index] + 1
        x.index_add_(0, index, torch.zeros(2, 4))
    found = {(one.name, one.bytes, one.flops) for one in counted_.costs}
    assert found == {
        ("mm", 4 * (8 * 4 + 4 * 6 + 8 * 6), 2 * 8 * 4 * 6),
        ("index", 2 * 8 + 2 * 4 * 2 * 4, 0),
        ("add", 2 * 4 * 2 * 4, 0),
        ("zeros", 4 * 2 * 4, 0),
        ("index_add_", 2 * 8 + 3 * 4 * 2 * 4, 0),
    }


def test_a_roofline_is_the_longer_of_moving_and_computing(scripts):
    cost = scripts["kernels_cost"]
    machine = cost.Machine("any", bandwidth=1e3, flops=1e6)
    assert cost.Cost("a", bytes=2000, flops=10).seconds(machine) == 2
    assert cost.Cost("a", bytes=10, flops=3_000_000).seconds(machine) == 3

"""What the kernels' binaries need of each target: registers, shared memory, spills.

Launches are recorded on tensors without storage, and compiled with the very specialisation that a
launch on a device would choose; nothing here needs one.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from molora.kernels import triton_bank, triton_programs
from molora.kernels.base import Base
from molora.kernels.lora_mix.triton_mix import lora_mix
from molora.kernels.lora_rows.triton_rows import lora_rows

PROGRAMS = ("narrow", "widen", "outer")
RUNTIME = ("depth", "part", "first_tile")
"""Numbers that programs are not compiled for, but for whether they are 1 or multiples of 16."""


@dataclass(frozen=True)
class Target:
    """A GPU: what triton calls it, the shared memory that one program may have, in bytes, and the
    FLOPs per byte that `triton_bank.balance` takes it for."""

    name: str
    gpu: GPUTarget
    shared_memory: int
    flops_per_byte: float


# CUDA C++ Programming Guide, table of compute capabilities: 163, 227 and 227 KB of shared memory
# per thread block; CDNA 3 instruction set: 64 KB of LDS per work-group
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, 125),
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, 235),
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, 235),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 150),
    )
}


@dataclass(frozen=True)
class Case:
    """A use of an op: what decides the launches."""

    op: str
    dtype: torch.dtype
    experts: int
    rank: int
    tokens: int = 8192
    slots: int = 2
    width: int = 4096
    base: bool = True
    shared_A: bool = False
    gated: bool = True

    def __str__(self) -> str:
        extra = [f"top-{self.slots}" if self.gated else "all", f"T {self.tokens}"]
        extra += ["shared A"] if self.shared_A else []
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.experts} × r{self.rank}, {dtype}, {', '.join(extra)}"


@dataclass(frozen=True)
class Launch:
    """One launch: the program, its arguments, and in how many programs."""

    program: str
    arguments: dict[str, Any]
    grid: tuple[int, int, int]


class _Recorder:
    """Stands for a program, notes what it is launched with and launches nothing."""

    def __init__(self, name: str, launches: list[Launch]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda **arguments: self.launches.append(Launch(self.name, arguments, grid))


@contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Note the launches made inside, as if on this target."""
    launches: list[Launch] = []
    stand_ins = {name: _Recorder(name, launches) for name in PROGRAMS}
    with (
        mock.patch.multiple(triton_programs, **stand_ins),
        mock.patch.object(triton_bank, "require"),
        mock.patch.object(triton_bank, "balance", return_value=target.flops_per_byte),
        mock.patch.object(torch.version, "hip", "7" if target.gpu.backend == "hip" else None),
    ):
        yield launches


def inputs(case: Case, device: str = "meta") -> dict[str, Any]:
    """The tensors of a case."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    width, dtype = case.width, case.dtype
    chosen = case.gated or case.op == "lora_rows"
    return {
        "x": empty(case.tokens, width, dtype=dtype).requires_grad_(),
        "gates": empty(case.tokens, case.slots).requires_grad_() if case.gated else None,
        "index": empty(case.tokens, case.slots, dtype=torch.int64) if chosen else None,
        "lora_A": empty(1 if case.shared_A else case.experts, case.rank, width).requires_grad_(),
        "lora_B": empty(case.experts, width, case.rank).requires_grad_(),
        "scaling": empty(case.experts),
        "base": Base(empty(width, width, dtype=dtype)) if case.base else None,
    }


def launches_of(case: Case, target: Target) -> list[Launch]:
    """Those of a forward and backward pass on the target."""
    p = inputs(case)
    factors = (p["lora_A"], p["lora_B"], p["scaling"])
    with recorded(target) as launches:
        if case.op == "lora_mix":
            y = lora_mix(p["x"], p["gates"], p["index"], *factors, base=p["base"])
        else:
            y = lora_rows(p["x"], p["index"], *factors)
        y.backward(torch.empty_like(y))
    return launches


@dataclass(frozen=True)
class Needs:
    """Of one program, by its binary.

    Attributes:
        threads: that run it.
        registers: of each thread; on AMD vector registers, with those for accumulation.
        shared: bytes of shared memory.
        spilled: bytes of memory for each thread that hold what registers do not; on AMD with the
            number of vector registers spilled.
        scalars: scalar registers that AMD's compiler keeps in lanes of vector ones; none of it
            reaches memory.
    """

    threads: int
    registers: int
    shared: int
    spilled: int
    scalars: int = 0


def needs(launch: Launch, target: Target) -> Needs:
    """Compile the program as a device would for this launch, and read the binary."""
    program: JITFunction[Any] = getattr(triton_programs, launch.program)
    backend = make_backend(target.gpu)
    binder = create_function_from_signature(program.signature, program.params, backend)
    arguments = launch.arguments
    bound, specialization, chosen = binder(**arguments)
    options, signature, constexprs, attributes = program._pack_args(
        backend, arguments, bound, specialization, chosen
    )
    source = ASTSource(program, signature, constexprs, attributes)
    compiled = triton.compile(source, target=target.gpu, options=options.__dict__)
    threads = compiled.metadata.num_warps * target.gpu.warp_size
    read = _of_cubin if "cubin" in compiled.asm else _of_amdgcn
    registers, *spilled = read(compiled.asm)
    return Needs(threads, registers, compiled.metadata.shared, *spilled)


def _of_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers, and bytes of local memory: a program of ours has nothing else to put there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage says nothing of registers:\n{report}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _of_amdgcn(asm: dict[str, Any]) -> tuple[int, int, int]:
    """Vector registers, those spilled and bytes of scratch, and scalar ones kept elsewhere."""

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", asm["amdgcn"])
        if found is None:
            raise ValueError(f"the kernel's metadata has no .{key}")
        return int(found[1])

    spilled = value("vgpr_spill_count") + value("private_segment_fixed_size")
    return value("vgpr_count"), spilled, value("sgpr_spill_count")


def binary(launch: Launch) -> tuple[Any, ...]:
    """What tells binaries apart: launches with the same one share it."""

    def kind(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(kind("", part) for part in value)
        if isinstance(value, torch.Tensor):
            return value.dtype
        if name in RUNTIME or not name:
            return None if value is None else (value == 1, value % 16 == 0)
        return value

    return launch.program, *(kind(name, value) for name, value in launch.arguments.items())

"""The page docs/kernels.md, from the formulas of kernels_cost.py and benchmarks/kernels.json."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from typing import Any

from kernels_compiled import TARGETS, Case, launches_of
from kernels_cost import MACHINES, Cost, Machine, launch_cost, path_costs
from kernels_text import BINARIES_HEAD, COSTS_HEAD, HEAD, LAUNCHES_HEAD, LIMITS, TRITON
from scaling_page import table

from molora.kernels import BACKENDS
from molora.kernels.triton_bank import sorting_pays

PATHS = {
    "loop": "a loop over experts",
    "reference": "`reference`",
    "dense": "`dense`",
    "triton": "`triton`",
}
# the launches of a pass are those that the machine's target takes
ON = {MACHINES[0]: TARGETS["sm_80"], MACHINES[1]: TARGETS["sm_90"]}


def page(binaries: Mapping[str, Any], cases: Sequence[Case]) -> str:
    """The whole page."""
    mixes = [case for case in cases if case.op == "lora_mix"]
    parts = [
        HEAD,
        backends_table(),
        triton_text(),
        COSTS_HEAD,
        base_line(mixes[0]),
        *(part for case in mixes for part in cost_table(case)),
        LAUNCHES_HEAD,
        *(part for case in cases for part in launch_table(case)),
        BINARIES_HEAD.format(version=binaries["triton"]),
        *binaries_tables(binaries, cases),
        LIMITS,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def triton_text() -> str:
    ranks = {
        op: " and ".join(str(first_sorted(op, on.flops_per_byte)) for on in ON.values())
        for op in ("lora_mix", "lora_rows")
    }
    names = " and ".join(machine.name for machine in ON)
    return TRITON.format(mix=ranks["lora_mix"], rows=ranks["lora_rows"], names=names)


def first_sorted(op: str, flops_per_byte: float) -> int:
    """The smallest E·R for which rows are sorted, with two slots."""
    how = {"summed": op == "lora_mix", "flops_per_byte": flops_per_byte}
    return next(ranks for ranks in range(1, 2**16) if sorting_pays(1, ranks, 2, **how))


def backends_table() -> str:
    rows = [
        [f"`{name}`", first_line("lora_mix", name), first_line("lora_rows", name)]
        for name in BACKENDS
    ]
    return table(["backend", "lora_mix", "lora_rows"], rows)


def first_line(op: str, name: str) -> str:
    """What the module of a backend says of itself."""
    full = f"molora.kernels.{op}.{name}"
    if find_spec(full) is None:
        full = f"molora.kernels.{op}.{name}_{op.removeprefix('lora_')}"
    doc = importlib.import_module(full).__doc__ or ""
    return " ".join(doc.strip().split("\n\n")[0].split()).removesuffix(".")


def base_line(case: Case) -> str:
    flops = 2 * case.tokens * case.width**2
    moved = 2 * (2 * case.tokens * case.width + case.width**2)
    base = Cost("base", moved, flops)
    times = " and ".join(f"{us(base.seconds(m))} µs on {m.name}" for m in MACHINES)
    return (
        f"For comparison, the base's product alone moves {mb(base.bytes)} MB and computes "
        f"{gflop(base.flops)} GFLOP: {times}, and as much again in the backward pass."
    )


def cost_table(case: Case) -> Iterator[str]:
    yield f"**{case.experts} experts of rank {case.rank}**"
    rows = []
    for path, name in PATHS.items():
        found = {machine: costs_of(path, case, target) for machine, target in ON.items()}
        for number, direction in enumerate(("forward", "backward")):
            costs = {machine: both[number] for machine, both in found.items()}
            moved = {mb(sum(c.bytes for c in of)) for of in costs.values()}
            computed = {gflop(sum(c.flops for c in of)) for of in costs.values()}
            rows.append(
                [
                    name if number == 0 else "",
                    direction,
                    " / ".join(sorted(moved, key=float)),
                    " / ".join(sorted(computed, key=float, reverse=True)),
                    *(us(total(of, machine)) for machine, of in costs.items()),
                    " / ".join(sorted({str(len(of)) for of in costs.values()}, key=int)),
                ]
            )
    yield table(["path", "", "MB", "GFLOP", *(f"{m.name}, µs" for m in MACHINES), "calls"], rows)


costs_of = cache(path_costs)


def total(costs: Sequence[Cost], machine: Machine) -> float:
    return sum(cost.seconds(machine) for cost in costs)


def purpose(program: str, weighted: bool) -> str:
    """What a launch computes."""
    if program == "narrow":
        return "∂h, ∂gates from ∂y" if weighted else "h from x"
    if program == "widen":
        return "y from h" if weighted else "∂x from ∂h"
    return "∂B from h, ∂y" if weighted else "∂A from ∂h, x"


def launch_table(case: Case) -> Iterator[str]:
    yield f"**{case.op}, {case.experts} experts of rank {case.rank}**"
    rows = []
    for machine, target in ON.items():
        launches = launches_of(case, target)
        key = [(one.program, one.arguments["WEIGHTED"]) for one in launches]
        for (program, weighted), group in groupby(range(len(launches)), key.__getitem__):
            members = [launches[i] for i in group]
            costs = [launch_cost(one) for one in members]
            moved, flops = sum(c.bytes for c in costs), sum(c.flops for c in costs)
            bound = "memory" if moved / machine.bandwidth > flops / machine.flops else "products"
            layout = "sorted" if members[0].arguments["SORTED"] else "as they come"
            rows.append(
                [
                    machine.name,
                    f"`{program}`" + (f" × {len(members)}" if len(members) > 1 else ""),
                    purpose(program, weighted),
                    layout,
                    *(mb(moved), gflop(flops), us(total(costs, machine)), bound),
                ]
            )
    head = ["machine", "program", "", "rows", "MB", "GFLOP", "µs", "bound by"]
    yield table(head, rows)


def binaries_tables(binaries: Mapping[str, Any], cases: Sequence[Case]) -> Iterator[str]:
    for number, case in enumerate(cases):
        kept = [row for row in binaries["rows"] if row["case"] == number]
        lines: dict[tuple[Any, ...], dict[str, str]] = {}
        for row in kept:
            layout = "sorted" if row["sorted"] else "as they come"
            what = purpose(row["program"], row["weighted"])
            if row["program"] == "widen":
                what += ", added" if row["add"] else ""
            tile = " × ".join(map(str, row["tile"]))
            cell = f"{row['registers']} · {row['shared'] / 1024:.0f} KB · {row['spilled']}"
            lines.setdefault((f"`{row['program']}`", what, layout, tile), {})[row["target"]] = cell
        yield f"**{case}**"
        yield table(
            ["program", "", "rows", "tile", *TARGETS],
            [[*key, *(cells.get(name, "–") for name in TARGETS)] for key, cells in lines.items()],
        )


def mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def gflop(count: float) -> str:
    return f"{count / 1e9:.1f}"


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"

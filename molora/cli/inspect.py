"""``molora inspect``."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molora.errors import CheckpointError

if TYPE_CHECKING:
    from molora.config import MixtureConfig
    from molora.io import Manifest


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A saved mixture.")],
) -> None:
    """Check a saved mixture and show what is in it.

    Method, base, parameters by role, files, and experts per layer. Every file is read and compared
    with its manifest; the base model is not needed.

    \b
    Example:
      molora inspect runs/mola/adapter
    """
    from molora import io

    check_no_run(directory)
    manifest = io.read_manifest(directory)
    io.read_tensors(directory, manifest)
    for line in described(directory, manifest):
        typer.echo(line)


def check_no_run(directory: Path) -> None:
    """Raise CheckpointError, with the place of its mixture, for the directory of a run."""
    from molora.io import MANIFEST

    inside = directory / "adapter"
    if not (directory / MANIFEST).exists() and (inside / MANIFEST).is_file():
        raise CheckpointError(f"{directory} is the directory of a run. Its mixture is in {inside}.")


@dataclass(frozen=True)
class Bank:
    """The experts of one linear, as the names and shapes of the tensors tell."""

    path: str
    num_experts: int
    ranks: tuple[int, ...]
    """One per block."""
    in_features: int = 0
    out_features: int = 0
    shared_A: bool = False
    sizes: tuple[int, ...] = ()
    """Experts of each block; may be left out if there is one."""
    stacked: int = 1
    """Weights of a parameter of the base's own experts, each with the bank's experts of its own."""

    def __str__(self) -> str:
        counts: dict[int, int] = defaultdict(int)
        for rank, size in zip(self.ranks, self.sizes or (self.num_experts,), strict=True):
            counts[rank] += size // self.stacked
        shown = " + ".join(f"{counts[rank]}×{rank}" for rank in sorted(counts))
        return shown if self.stacked == 1 else f"{self.stacked} × ({shown})"


def described(directory: Path, manifest: Manifest) -> Iterable[str]:
    """The lines that `molora inspect` prints."""
    from molora import io
    from molora.cli.experts import routing_lines, saved_table
    from molora.cli.text_routing import text_router_lines

    shapes = {name: info.shape for name, info in manifest.tensors.items()}
    banks = [_with_stack(bank, manifest.mixture) for bank in banks_of(shapes)]
    routers = {name.partition(".router.")[0] for name in shapes if ".router." in name}
    yield (
        f"method   {manifest.mixture.method} (format {manifest.format_version}, written by "
        f"molora {manifest.molora_version})"
    )
    yield f"base     {manifest.base.name}"
    yield f"sites    {len(banks)} linears with experts, {len(routers)} routers"
    yield from routing_lines(manifest.mixture)
    yield from text_router_lines(directory, manifest.mixture)
    for role, count in parameters_by_role(shapes).items():
        yield f"{role:<8} {count:,} parameters"
    for name, note in ((io.MANIFEST, "checked"), (manifest.tensors_file, "sha256 matches")):
        yield f"file     {name}, {(directory / name).stat().st_size:,} bytes, {note}"
    yield ""
    if table := saved_table(manifest.mixture):
        yield from [*table, ""]
    yield from allocation_table(banks)
    yield ""
    yield from backend_table(banks, manifest.mixture)


def banks_of(shapes: Mapping[str, tuple[int, ...]]) -> list[Bank]:
    """The banks in the order of their tensors; the blocks of a bank are put together."""
    blocks: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, shape in shapes.items():
        if found := re.fullmatch(r"(.+)\.experts\.(?:\d+\.)?lora_B", name):
            blocks[found[1]].append((shape[0], shape[2]))
    banks = []
    for path, members in blocks.items():
        shape_A, shape_B = (shapes[f"{path}.experts.{name}"] for name in ("lora_A", "lora_B"))
        banks.append(
            Bank(
                path,
                sum(count for count, _ in members),
                tuple(rank for _, rank in members),
                in_features=shape_A[2],
                out_features=shape_B[1],
                shared_A=shape_A[0] < shape_B[0],
                sizes=tuple(count for count, _ in members),
            )
        )
    return banks


def _with_stack(bank: Bank, config: MixtureConfig) -> Bank:
    stacked = (getattr(group.expert, "stacked", {}).get(bank.path) for group in config.groups)
    return replace(bank, stacked=next(filter(None, stacked), 1))


def parameters_by_role(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Numbers of saved values: experts, router, other if there are any, and all."""
    counts = {"experts": 0, "router": 0, "other": 0}
    for name, shape in shapes.items():
        role = "experts" if ".experts." in name else "router" if ".router." in name else "other"
        counts[role] += math.prod(shape)
    shown = {role: count for role, count in counts.items() if count or role != "other"}
    return {**shown, "all": sum(counts.values())}


def allocation_table(banks: Iterable[Bank]) -> list[str]:
    """Experts × rank, a line per run of equal layers and linears with equally many experts."""
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    for bank in banks:
        found = re.match(r"(.*?)\.(\d+)\.(.+)", bank.path)
        layer, linear = (f"{found[1]}.{found[2]}", found[3]) if found else ("-", bank.path)
        layers[layer][linear] = str(bank)
    rows: list[tuple[str, ...]] = [("layer", "experts×rank", "linears")]
    for first, last in _runs(sorted(layers, key=_layer_key), layers):
        label = first if first == last else f"{first}–{last.rpartition('.')[2]}"
        linears: dict[str, list[str]] = defaultdict(list)
        for linear, experts in layers[first].items():
            linears[experts].append(linear)
        for experts, names in linears.items():
            rows.append((label, experts, _by_parent(names)))
            label = ""
    return aligned(rows)


def backend_table(banks: Iterable[Bank], config: MixtureConfig) -> list[str]:
    """The backend, and what "auto" stands for on this machine, a line for each kind of bank."""
    if config.backend != "auto":
        return [f"backend  {config.backend}"]
    from molora.cli.backends import choices
    from molora.kernels.cost import TRAINING_ROWS

    # what the base's own experts have is computed with the rows that it sorts, by no backend
    found = choices([bank for bank in banks if bank.stacked == 1], config)
    linears: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for choice in found.of_banks:
        bank, acting = choice.bank, choice.acting or "all"
        key = (f"{bank.in_features} to {bank.out_features}", f"{acting} of {bank}")
        linears[(*key, choice.training, choice.decoding)].append(_without_layer(bank.path))
    heads = ("width", "experts×rank", f"{TRAINING_ROWS} rows, training", "1 row, decoding")
    rows: list[tuple[str, ...]] = [(*heads, "linears")]
    rows += [(*key, _by_parent(dict.fromkeys(names))) for key, names in linears.items()]
    return [f"backend  auto, which is for {found.dtype} on {found.device}:", *aligned(rows)]


def _without_layer(path: str) -> str:
    found = re.match(r".*?\.\d+\.(.+)", path)
    return found[1] if found else path


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns side by side; the last is as wide as it is."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return [
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]


def _by_parent(linears: Iterable[str]) -> str:
    """``mlp: gate_proj up_proj; self_attn: q_proj``."""
    names: dict[str, list[str]] = defaultdict(list)
    for linear in linears:
        parent, _, name = linear.rpartition(".")
        names[parent].append(name)
    groups = [f"{parent}: {' '.join(n)}" if parent else " ".join(n) for parent, n in names.items()]
    return "; ".join(groups)


def _layer_key(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return (stack, int(number)) if number.isdecimal() else (layer, -1)


def _runs(ordered: list[str], layers: Mapping[str, dict[str, str]]) -> Iterable[tuple[str, str]]:
    """First and last of successive layers of one stack that have the same experts."""
    runs: list[tuple[str, str]] = []
    for layer in ordered:
        if runs:
            first, last = runs[-1]
            stack, number = _layer_key(last)
            if _layer_key(layer) == (stack, number + 1) and layers[layer] == layers[first]:
                runs[-1] = (first, layer)
                continue
        runs.append((layer, layer))
    return runs

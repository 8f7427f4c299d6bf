"""What backend "auto" stands for in a saved mixture, as far as it is known without the base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molora.cli.inspect import Bank
    from molora.config import Group, MixtureConfig


@dataclass(frozen=True)
class BankChoice:
    """`acting` experts of a row, None for all, and the backends of a bank or of its blocks."""

    bank: Bank
    acting: int | None
    training: str
    decoding: str


@dataclass(frozen=True)
class Choices:
    """Of all banks, for x of a dtype on a type of device."""

    device: str
    dtype: str
    of_banks: tuple[BankChoice, ...]


def choices(banks: Sequence[Bank], config: MixtureConfig) -> Choices:
    """For a GPU and bfloat16 if this machine has one, else for the CPU and float32.

    Raises:
        ConfigError: the user's figures are damaged.
    """
    import torch

    from molora.kernels.calibration import load_calibration
    from molora.kernels.cost import TRAINING_ROWS

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    calibration = load_calibration()
    depth = max((layer_of(bank.path) for bank in banks), default=0) + 1
    found = []
    for bank in banks:
        op, acting = routing_of(bank, config, depth)
        training, decoding = (
            _backends(
                *(bank, op, acting, rows),
                training=rows > 1,
                dtype=dtype,
                device_type=device,
                calibration=calibration,
            )
            for rows in (TRAINING_ROWS, 1)
        )
        found.append(BankChoice(bank, acting, training, decoding))
    return Choices(device, str(dtype).removeprefix("torch."), tuple(found))


def layer_of(path: str) -> int:
    """The number of a linear's layer, 0 outside of layers."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found[1]) if found else 0


def routing_of(bank: Bank, config: MixtureConfig, depth: int) -> tuple[str, int | None]:
    """The op that computes a bank, and how many experts of a row act, None for all."""
    from molora.config import Capacity, TopK, UnitTop1, resolve

    if bank.num_experts == 1:
        return "lora_mix", None
    group = next((g for g in config.groups if targets(g, bank.path)), config.groups[0])
    op = "lora_rows" if group.site.kind == "ffn" else "lora_mix"
    if isinstance(group.select, UnitTop1):
        return op, 1
    if not isinstance(group.select, (TopK, Capacity)):
        return op, None
    top_k = resolve(group.select.k, depth, what="top_k")[layer_of(bank.path)]
    return op, min(top_k, bank.num_experts)


def targets(group: Group, path: str) -> bool:
    """Whether a group's patterns name a linear of which the path alone is known."""
    from molora.attach.families import is_attention

    def named(pattern: str) -> bool:
        if pattern.startswith("re:"):
            return re.fullmatch(pattern.removeprefix("re:"), path) is not None
        if pattern in ("attention", "ffn"):
            return is_attention(path) == (pattern == "attention")
        return pattern == "all" or f".{path}".endswith(f".{pattern}")

    return any(map(named, group.targets))


def _backends(
    bank: Bank,
    op: str,
    acting: int | None,
    rows: int,
    **options: Any,
) -> str:
    from molora.attach.families import OUTPUT_NAMES
    from molora.kernels import BACKENDS, cost

    slots = acting
    if op == "lora_rows" and bank.path.rpartition(".")[2] in OUTPUT_NAMES:
        # every slot has an input of its own
        rows, slots = rows * (acting or bank.num_experts), 1
    names = [
        cost.choose(
            op,
            rows=rows,
            in_features=bank.in_features,
            out_features=bank.out_features,
            num_experts=bank.num_experts,
            rank=rank,
            slots=slots,
            shared_A=bank.shared_A,
            **options,
            names=tuple(name for name in cost.CANDIDATES if name in BACKENDS),
        )
        for rank in dict.fromkeys(bank.ranks)
    ]
    return "+".join(dict.fromkeys(names))

"""What molora does not do, as a control: experts as modules of their own, skipped when they get no
token or run in the order of the tokens. Under ZeRO that trains wrong weights, without an error."""

from __future__ import annotations

from typing import Any

import torch
from distributed_engines import Engine
from distributed_scenarios import difference
from torch import Tensor, nn

from molora.train.gather import gathered

WIDTH, EXPERTS, RANK, ROWS = 12, 4, 3, 8
KINDS = ("skip", "order", "touch")


class Expert(nn.Module):
    """B A x."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(0.3 * torch.randn(RANK, WIDTH))
        self.lora_B = nn.Parameter(0.3 * torch.randn(WIDTH, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.lora_A.T @ self.lora_B.T


class SkippedExperts(nn.Module):
    """Top-1 of EXPERTS; `touch` runs all of them on every rank in one order."""

    def __init__(self, *, touch: bool) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.touch = touch
        with torch.no_grad():  # the first features name the expert
            self.router.weight[:, :EXPERTS] = 4 * torch.eye(EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        gate, chosen = self.router(x).softmax(dim=-1).max(dim=-1)
        y = self.base(x)
        order = range(EXPERTS) if self.touch else list(dict.fromkeys(chosen.tolist()))
        for number in order:
            acts = (chosen == number)[:, None]
            y = y + acts * gate[:, None] * self.experts[number](x)
        return y


class Toy(nn.Module):
    """Two layers that read the same rows."""

    def __init__(self, *, touch: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SkippedExperts(touch=touch) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([layer(x) for layer in self.layers]).sum(dim=0)
        return (y**2).sum() / (2 * ROWS)


def rows(kind: str, rank: int) -> Tensor:
    """Each rank's rows: of its own experts, or for `order` of all, on rank 1 backwards."""
    x = 0.5 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(rank))
    if kind == "order":
        turns = torch.arange(ROWS) % EXPERTS
        chosen = turns if rank == 0 else EXPERTS - 1 - turns
    else:
        chosen = 2 * rank + torch.arange(ROWS) % 2
    x[:, :EXPERTS] = 2 * nn.functional.one_hot(chosen, EXPERTS)
    return x


def toy(kind: str) -> Toy:
    torch.manual_seed(0)
    return Toy(touch=kind == "touch")


def error_of_a_step(engine_name: str, kind: str, rank: int) -> dict[str, Any]:
    """One step of SGD on two ranks against one process: the largest difference of a weight."""
    one = toy(kind)
    optimiser = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
    for other in range(2):
        one(rows(kind, other)).backward()
    optimiser.step()
    two = toy(kind)
    before = {n: p.detach().clone() for n, p in two.named_parameters()}
    engine = Engine(engine_name, two)
    engine.backward(engine.wrapped(rows(kind, rank)))
    engine.step()
    named = dict(two.named_parameters())
    with gathered(named.values()):
        found = {n: p.detach().clone() for n, p in named.items()}
    engine.close()
    expected = {n: p.detach() for n, p in one.named_parameters()}
    return {"error": difference(found, expected), "moved": difference(expected, before)}

"""From a placement to the bank of its linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from molora.attach.initial import initial
from molora.attach.plan import Placement
from molora.config import Imported, ImportedExpert, LoRA, SharedA
from molora.errors import AttachError
from molora.experts import Block, ExpertBank, init
from molora.kernels.backend import Kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Factors(Protocol):
    """What an expert brings for one linear, or one stacked parameter; see `molora.io.adapter`. A
    linear's may have `bias` and `magnitude`."""

    @property
    def lora_A(self) -> Tensor: ...
    @property
    def lora_B(self) -> Tensor: ...


Brought = Mapping[str, Mapping[str, Factors]]
"""Expert → linear → factors. What is not in it starts anew, or at 0 if it is to be loaded."""


def check_fit(placements: Sequence[Placement], brought: Brought) -> None:
    """Raise AttachError if what an expert brings has not the shapes that its linear needs."""
    for placement in placements:
        width, height = placement.in_features, placement.out_features
        for name, modules in brought.items():
            factors = modules.get(placement.path)
            if factors is None:
                continue
            size = factors.lora_A.shape[-1], factors.lora_B.shape[-2]
            weights = tuple(factors.lora_A.shape[:-2])
            if weights != ((placement.stacked,) if placement.stacked else ()):
                raise AttachError(
                    f"expert {name} has a lora_A of shape {tuple(factors.lora_A.shape)} at "
                    f"{placement.path}, which is {placement.stacked or 'no'} stacked weights here. "
                    "It was trained on another base."
                )
            if size != (width, height):
                raise AttachError(
                    f"expert {name} maps {size[0]} to {size[1]} features at {placement.path}, "
                    f"which maps {width} to {height} here: lora_A is "
                    f"{tuple(factors.lora_A.shape)}, lora_B {tuple(factors.lora_B.shape)}. It was "
                    "trained on another base."
                )


def blocks_of(form: Imported, path: str) -> list[list[int]]:
    """The experts that adapt a linear, by number: a list for each block of its bank."""
    blocks: dict[object, list[int]] = {}
    for column, expert in enumerate(form.experts):
        if path in expert.modules:
            rank, _ = expert.modules[path]
            stored = "as trained" if expert.trainable else expert.dtype
            kind = (rank, stored, expert.sha256 is None, expert.has_bias, expert.has_magnitude)
            blocks.setdefault(kind, []).append(column)
    return list(blocks.values())


@dataclass(frozen=True)
class BankMaker:
    """Makes banks that start from the seed or with what experts bring."""

    seed: int
    dtype: torch.dtype
    """Of what is trained."""
    backend: Kernels
    brought: Brought

    def make(self, placement: Placement, device: torch.device) -> ExpertBank:
        """The bank of one linear."""
        form = placement.group.expert
        if isinstance(form, Imported):
            return self._imported(placement, form, device)
        return ExpertBank(
            [self._new(placement, form, device)],
            backend=self.backend,
            dropout=form.dropout.p,
            dropout_mask=form.dropout.mask,
        )

    def _new(self, placement: Placement, form: LoRA | SharedA, device: torch.device) -> Block:
        experts, rank = placement.num_experts, placement.rank
        shape_A = (1 if form.kind == "shared_a" else experts, rank, placement.in_features)
        alphas = form.alpha if isinstance(form.alpha, tuple) else [form.alpha] * experts
        return Block(
            lora_A=self._initial(placement, "", shape_A, form.init, 1 / rank, device),
            lora_B=init.empty(
                (experts, placement.out_features, rank), dtype=self.dtype, device=device
            ).zero_(),
            scaling=torch.as_tensor(alphas, dtype=torch.float32, device=device)
            / (rank if form.scaling == "alpha/r" else rank**0.5),
        )

    def _initial(
        self,
        placement: Placement,
        block: str,
        shape: tuple[int, ...],
        kind: str,
        std: float,
        device: torch.device,
    ) -> Tensor:
        name = f"{placement.path}.experts.{block}lora_A"
        return initial(name, shape, kind, std, seed=self.seed, dtype=self.dtype, device=device)

    def _imported(self, placement: Placement, form: Imported, device: torch.device) -> ExpertBank:
        """One block for all experts that are stored alike; experts that lack the linear are out.

        Of stacked weights every pair (expert e, weight j) is an expert of the bank, e · E_b + j.
        """
        blocks, each = blocks_of(form, placement.path), range(placement.stacked or 1)
        columns = [len(each) * e + j for members in blocks for e in members for j in each]
        in_order = columns == list(range(len(form.experts) * len(each)))
        return ExpertBank(
            [
                self._block(
                    placement, [form.experts[c] for c in members], f"{n}." if n else "", device
                )
                for n, members in enumerate(blocks)
            ],
            backend=self.backend,
            columns=None if in_order else columns,
            grow_gates=form.missing == "renorm",
            dropout=form.dropout.p,
            dropout_mask=form.dropout.mask,
        )

    def _dtype(self, expert: ImportedExpert) -> torch.dtype:
        return self.dtype if expert.trainable else DTYPES[expert.dtype]

    def _block(
        self,
        placement: Placement,
        experts: Sequence[ImportedExpert],
        name: str,
        device: torch.device,
    ) -> Block:
        path, first, each = placement.path, experts[0], placement.stacked or 1
        size = len(experts) * each
        rank = first.modules[path][0]
        dtype = self._dtype(first)
        shape_A, shape_B = (size, rank, placement.in_features), (size, placement.out_features, rank)
        empty_A = init.empty(shape_A, dtype=dtype, device=device).zero_()
        empty_B = init.empty(shape_B, dtype=dtype, device=device).zero_()
        if first.sha256 is None:
            empty_A = self._initial(placement, name, shape_A, "kaiming", 0.0, device)
        rows = init.empty((size, placement.out_features), dtype=dtype, device=device).zero_()
        scalings = [e.modules[path][1] for e in experts for _ in range(each)]
        has_bias, has_magnitude = (
            has and placement.stacked is None for has in (first.has_bias, first.has_magnitude)
        )
        block = Block(
            lora_A=empty_A,
            lora_B=empty_B,
            scaling=torch.tensor(scalings, device=device),
            trainable=first.trainable,
            bias=rows if has_bias else None,
            magnitude=rows.clone() if has_magnitude else None,
            row_scale=torch.ones_like(rows, dtype=torch.float32) if has_magnitude else None,
        )
        for number, expert in enumerate(experts):
            if path in self.brought.get(expert.name, {}):
                own = slice(number * each, (number + 1) * each)
                _fill(block, own, self.brought[expert.name][path])
        return block


def _fill(block: Block, rows: slice, factors: Factors) -> None:
    for name in ("lora_A", "lora_B", "bias", "magnitude"):
        own, given = getattr(block, name), getattr(factors, name, None)
        if own is not None and given is not None:
            own[rows].copy_(given)

"""A bank: the experts of one projection, stacked so that each takes part in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from molora.dtypes import apply_keeping_dtype
from molora.kernels import Backend, Base
from molora.kernels.lora_mix import reference
from molora.routing.record import Routing


@dataclass(frozen=True)
class Block:
    """Experts of one rank and one trainability.

    Attributes:
        lora_A: (E, R, in), or (1, R, in) if all share one down-projection.
        lora_B: (E, out, R).
        scaling: (E,) float32.
        trainable: whether the factors get gradients.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    trainable: bool = True


class ExpertBank(nn.Module):
    """delta = Σ_k gate_k · scaling · B A dropout(x), over one block of stacked experts or several.

    The first block's factors are `lora_A` and `lora_B`; further blocks are the children `1`, `2`, …
    Experts are numbered through the blocks. No expert is ever skipped: a parameter without a
    gradient on one rank trains silently wrong under ZeRO.
    """

    FACTOR_ROLES: ClassVar = {"lora_A": "A", "lora_B": "B"}
    """Role of each factor in learning rates and freezing, whatever its shape."""
    scaling: Tensor

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        backend: Backend,
        dropout: float = 0.0,
        dropout_mask: Literal["shared", "per_expert"] = "shared",
    ) -> None:
        super().__init__()
        first, *rest = blocks
        self.lora_A = nn.Parameter(first.lora_A, requires_grad=first.trainable)
        self.lora_B = nn.Parameter(first.lora_B, requires_grad=first.trainable)
        self.register_buffer("scaling", first.scaling, persistent=False)
        self.trainable = first.trainable
        # not read from the factors later: partitioned by ZeRO-3, they have the shape (0,)
        self.size, self.rank = first.lora_B.shape[0], first.lora_A.shape[1]
        for number, block in enumerate(rest, start=1):
            self.add_module(str(number), ExpertBank([block], backend=backend))
        self.backend = backend
        self.dropout = dropout
        self.dropout_mask = dropout_mask

    @property
    def num_experts(self) -> int:
        return sum(block.size for block in self.blocks())

    def blocks(self) -> Iterator[ExpertBank]:
        """The blocks in the order of their experts; the bank itself is the first."""
        yield self
        yield from (child for child in self.children() if isinstance(child, ExpertBank))

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(role, parameter) of every factor of the blocks that are meant to be trained."""
        for block in self.blocks():
            if block.trainable:
                yield from ((role, getattr(block, n)) for n, role in block.FACTOR_ROLES.items())

    def shared_factor(self) -> Tensor | None:
        """The stacked A whose product with x a caller may make, to give it as `down_TP`; None if
        this bank makes it by itself."""
        return self.lora_A if self._in_halves() and not self._drops() else None

    def _in_halves(self) -> bool:
        """Whether the update is `lora_down`, then `lora_up`."""
        apart = self.backend.lora_down is not None and len(list(self.blocks())) == 1
        return apart and not (self._drops() and self.dropout_mask == "per_expert")

    def _down(self, x_TD: Tensor) -> Tensor:
        """A dropout(x), (T, E·R), which keeps the dropout's mask and no other input."""
        assert self.backend.lora_down is not None
        dropout = self.dropout if self._drops() else 0.0
        (down_TP,), _ = self.backend.lora_down(
            x_TD, [self.lora_A], [], dtype=compute_dtype(x_TD), dropout=dropout
        )
        return down_TP

    def _up(
        self, x_TD: Tensor, down_TP: Tensor, routing: Routing | None, base: Base | None
    ) -> Tensor:
        assert self.backend.lora_up is not None
        gates_TE = None if routing is None else routing.dense_gates()
        return self.backend.lora_up(x_TD, down_TP, gates_TE, self.lora_B, self.scaling, base=base)

    def forward(
        self,
        x_TD: Tensor,
        routing: Routing | None,
        *,
        slots_TK: Tensor | None = None,
        down_TP: Tensor | None = None,
        base: Base | None = None,
    ) -> Tensor:
        """(T, in) and its rows' decision → (T, out); without one, all experts act with gate 1.

        With `base`, its product of x and the update. `down_TP` is the product of x with
        `shared_factor()`, if it was made already. With `slots_TK`, expert indices of a bank of one
        block, → (T, K, out): the ungated update of each of them. All come through here because
        ZeRO-3 has a module's parameters whole while the module is called, not in other methods.
        """
        dtype = compute_dtype(x_TD)
        if slots_TK is not None:
            return self._rows(x_TD.to(dtype), slots_TK)
        if self._in_halves() and x_TD.dim() == 2:
            return self._up(x_TD, self._down(x_TD) if down_TP is None else down_TP, routing, base)
        x = self._dropped(x_TD.to(dtype))
        if base is not None and self._drops():
            return base.product(x_TD) + self._blocks_mixed(x, routing, None)
        return self._blocks_mixed(x, routing, base)

    def _blocks_mixed(self, x: Tensor, routing: Routing | None, base: Base | None) -> Tensor:
        own, *others = blocks = list(self.blocks())
        if not others:
            return self._mixed(x, routing, base)
        sizes = [block.size for block in blocks]
        inputs = x.split(sizes) if x.dim() == 3 else [x] * len(blocks)
        decisions: list[Routing | None] = [None] * len(blocks)
        if routing is not None:
            decisions = [_dense(gates) for gates in routing.dense_gates().split(sizes, dim=1)]
        y_TF = own._mixed(inputs[0], decisions[0], base)
        for block, x_b, decision in zip(others, inputs[1:], decisions[1:], strict=True):
            y_TF = y_TF + block(x_b, decision)
        return y_TF

    def _mixed(self, x: Tensor, routing: Routing | None, base: Base | None) -> Tensor:
        """The update of the block's own experts, and the base's product."""
        # an input per expert: only the reference takes one, and the option is documented as slow
        mix = self.backend.lora_mix if x.dim() == 2 else reference.lora_mix
        gates_TK = index_TK = None
        if routing is not None:
            gates_TK = routing.gates
            index_TK = None if routing.in_order else routing.expert_index
        return mix(x, gates_TK, index_TK, self.lora_A, self.lora_B, self.scaling, base=base)

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _rows(self, x_TD: Tensor, expert_index_TK: Tensor) -> Tensor:
        index_TK = expert_index_TK
        if self._drops() and self.dropout_mask == "per_expert":
            # a row with a mask of its own for every slot, since no expert has two slots of a row
            x_TD = x_TD.repeat_interleave(expert_index_TK.shape[1], dim=0)
            index_TK = expert_index_TK.reshape(-1, 1)
        x_TD = nn.functional.dropout(x_TD, self.dropout, self.training)
        delta = self.backend.lora_rows(x_TD, index_TK, self.lora_A, self.lora_B, self.scaling)
        return delta.view(*expert_index_TK.shape, -1)

    def _dropped(self, x_TD: Tensor) -> Tensor:
        """(T, in), or with a mask per expert (E, T, in)."""
        if not self._drops():
            return x_TD
        if self.dropout_mask == "per_expert":
            x_TD = x_TD.expand(self.num_experts, -1, -1)
        return nn.functional.dropout(x_TD, self.dropout)

    def extra_repr(self) -> str:
        ranks = ", ".join(str(block.rank) for block in self.blocks())
        return f"num_experts={self.num_experts}, rank={ranks}, backend={self.backend.name}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ExpertBank:
        return apply_keeping_dtype(self, super()._apply, fn, recurse)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _dense(gates_TE: Tensor) -> Routing:
    """The decision that all experts act with these gates, which may be 0."""
    every_TE = torch.arange(gates_TE.shape[1], device=gates_TE.device).expand_as(gates_TE)
    chosen_TE = torch.ones_like(every_TE, dtype=torch.bool)
    return Routing(None, gates_TE, gates_TE, every_TE, chosen_TE, in_order=True)

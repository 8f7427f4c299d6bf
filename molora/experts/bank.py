"""A bank: the experts of one projection, stacked so that each takes part in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from molora.dtypes import apply_keeping_dtype
from molora.experts.gates import grown, of_largest
from molora.kernels import Backend, Base
from molora.kernels.backend import Kernels
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
        bias: (E, out), added to B A x before scaling and gate, or None.
        magnitude: (E, out), the norms of the rows of W + ΔW_e (DoRA), or None.
        row_scale: (E, out) float32, magnitude / ‖rows of W + ΔW_e‖, where there is a magnitude.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    trainable: bool = True
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    row_scale: Tensor | None = None


class ExpertBank(nn.Module):
    """delta = Σ_k gate_k · scaling · B A dropout(x), over one block of stacked experts or several.

    The first block's factors are `lora_A` and `lora_B`; further blocks are the children `1`, `2`, …
    Experts are numbered through the blocks. No expert is ever skipped: a parameter without a
    gradient on one rank trains silently wrong under ZeRO.

    Args:
        blocks: the experts.
        backend: what computes.
        columns: the number that each expert has in routing decisions, where some of the deciding
            router's experts are not in this bank or have another place; None: 0, 1, …
        grow_gates: whether the gates of the bank's experts grow to the sum that all experts' have,
            where some are not in the bank.
        dropout, dropout_mask: on the experts' input.
    """

    FACTOR_ROLES: ClassVar = {"lora_A": "A", "lora_B": "B"}
    """Role of each factor in learning rates and freezing, whatever its shape."""
    scaling: Tensor
    row_scale: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        backend: Kernels,
        columns: Sequence[int] | None = None,
        grow_gates: bool = False,
        dropout: float = 0.0,
        dropout_mask: Literal["shared", "per_expert"] = "shared",
    ) -> None:
        super().__init__()
        first, *rest = blocks
        self.lora_A = nn.Parameter(first.lora_A, requires_grad=first.trainable)
        self.lora_B = nn.Parameter(first.lora_B, requires_grad=first.trainable)
        self.bias = _frozen(first.bias)
        self.magnitude = _frozen(first.magnitude)
        self.register_buffer("scaling", first.scaling, persistent=False)
        self.register_buffer("row_scale", first.row_scale, persistent=False)
        device = first.scaling.device
        places = None if columns is None else torch.tensor(columns, device=device)
        self.register_buffer("columns", places, persistent=False)
        self.grow_gates = grow_gates
        self.trainable = first.trainable
        # not read from the factors later: partitioned by ZeRO-3, they have the shape (0,)
        self.size, self._out_features, self.rank = first.lora_B.shape
        self._in_features = first.lora_A.shape[2]
        self.shares_A = first.lora_A.shape[0] < self.size
        self.is_alone = not rest
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

    def kernels(self, op: str, x: Tensor, slots: int | None) -> Backend:
        """The backend for `op`, "lora_mix" or "lora_rows", and a shape; with "auto" the one that is
        estimated to take the least time for so many rows, in training for a fixed number of them.

        Args:
            x: (..., in).
            slots: experts that a row chooses, of which some may be elsewhere; None: all.
        """
        if isinstance(self.backend, Backend):
            return self.backend
        slots = None if slots is None or slots >= self.size else slots
        return self.backend.choose(
            op,
            rows=x.shape[:-1].numel(),
            in_features=self._in_features,
            out_features=self._out_features,
            num_experts=self.size,
            rank=self.rank,
            slots=slots,
            dtype=compute_dtype(x),
            device_type=x.device.type,
            shared_A=self.shares_A,
            training=torch.is_grad_enabled(),
        )

    def shared_factor(self, x: Tensor, slots: int | None) -> Tensor | None:
        """The stacked A whose product with x a caller may make, to give it as `down_TP`; None if
        this bank makes it by itself. Arguments as for `kernels`."""
        apart = self._in_halves(self.kernels("lora_mix", x, slots)) and not self._drops()
        return self.lora_A if apart else None

    def _in_halves(self, kernels: Backend) -> bool:
        """Whether the update is `lora_down`, then `lora_up`."""
        apart = kernels.lora_down is not None and self.is_alone and self.row_scale is None
        return apart and not (self._drops() and self.dropout_mask == "per_expert")

    def forward(
        self,
        x_TD: Tensor,
        routing: Routing | list[Routing] | None,
        *,
        slots_TK: Tensor | None = None,
        down_TP: Tensor | None = None,
        base: Base | None = None,
        product_TF: Tensor | None = None,
        readout_NEF: Tensor | None = None,
    ) -> Tensor:
        """(T, in) and its rows' decision → (T, out); without one, all experts act with gate 1. A
        list has a decision for each block, about the block's own experts.

        With `base`, its product of x and the update. `down_TP` is the product of x with
        `shared_factor()`, if it was made already; `product_TF` is x Wᵀ of the base, which a bank
        that `reads_product` needs. With `slots_TK`, expert indices of a bank of one block, → (T, K,
        out): the ungated update of each of them. With `readout_NEF`, (N, E, out) over all that a
        decision counts, → (T, N + 1) in float32: the products of each (E, out) with the ungated
        updates of a row without DoRA's rows, and the sum of their squares. All come through here
        because ZeRO-3 has a module's parameters whole while the module is called, not in other
        methods.
        """
        if readout_NEF is not None:
            return self._read_out(x_TD, readout_NEF)
        if slots_TK is not None:
            x = self.dropped_rows(x_TD, slots_TK)
            return self.rows(x, slots_TK, self.lora_A, self.lora_B)
        decisions = self._decisions(routing)
        kernels = self.kernels("lora_mix", x_TD, acting(decisions[0]))
        if self._in_halves(kernels) and x_TD.dim() == 2:
            y_TF = self._halves(kernels, x_TD, decisions[0], down_TP, base)
            return self._with_bias(y_TF, decisions[0])
        x = self._dropped(x_TD.to(compute_dtype(x_TD)))
        if base is not None and self._drops():
            return base.product(x_TD) + self._blocks_mixed(kernels, x, decisions, None, product_TF)
        return self._blocks_mixed(kernels, x, decisions, base, product_TF)

    @property
    def reads_product(self) -> bool:
        """Whether an expert scales the rows of the base's weight, so that x Wᵀ is needed."""
        return any(block.row_scale is not None for block in self.blocks())

    def _decisions(self, routing: Routing | list[Routing] | None) -> Sequence[Routing | None]:
        """The part of a decision that is about each block's experts."""
        if isinstance(routing, list):
            return routing
        blocks = list(self.blocks())
        if routing is None or (self.is_alone and self.columns is None):
            return [routing] * len(blocks)
        gates_TE = routing.dense_gates()
        if self.columns is not None:
            own_TE = gates_TE.index_select(1, self.columns)
            gates_TE = grown(own_TE, gates_TE) if self.grow_gates else own_TE
        slots = acting(routing)
        parts = gates_TE.split([block.size for block in blocks], dim=1)
        return [of_largest(part, slots) for part in parts]

    def _halves(
        self,
        kernels: Backend,
        x_TD: Tensor,
        routing: Routing | None,
        down_TP: Tensor | None,
        base: Base | None,
    ) -> Tensor:
        """Down, with a dropout of which only the mask is kept, and up."""
        assert kernels.lora_down is not None
        assert kernels.lora_up is not None
        if down_TP is None:
            dropout = self.dropout if self._drops() else 0.0
            (down_TP,), _ = kernels.lora_down(
                x_TD, [self.lora_A], [], dtype=compute_dtype(x_TD), dropout=dropout
            )
        gates_TE = None if routing is None else routing.dense_gates()
        return kernels.lora_up(x_TD, down_TP, gates_TE, self.lora_B, self.scaling, base=base)

    def _blocks_mixed(
        self,
        kernels: Backend,
        x: Tensor,
        decisions: Sequence[Routing | None],
        base: Base | None,
        product_TF: Tensor | None,
    ) -> Tensor:
        own, *others = blocks = list(self.blocks())
        inputs = x.split([b.size for b in blocks]) if x.dim() == 3 else [x] * len(blocks)
        y_TF = own._mixed(kernels, inputs[0], decisions[0], base)
        y_TF = own._with_rows(own._with_bias(y_TF, decisions[0]), decisions[0], product_TF)
        for block, x_b, decision in zip(others, inputs[1:], decisions[1:], strict=True):
            y_TF = y_TF + block(x_b, decision, product_TF=product_TF)
        return y_TF

    def _with_bias(self, y_TF: Tensor, routing: Routing | None) -> Tensor:
        """y + Σ_e gate_e · scaling_e · bias_e, over the block's own experts."""
        if self.bias is None:
            return y_TF
        weights_TE = self.scaling.expand(len(y_TF), -1)
        if routing is not None:
            weights_TE = weights_TE * routing.dense_gates()
        return y_TF + weights_TE.to(y_TF.dtype) @ self.bias.to(y_TF.dtype)

    def _with_rows(
        self, y_TF: Tensor, routing: Routing | None, product_TF: Tensor | None
    ) -> Tensor:
        """y + Σ_e gate_e · (row_scale_e − 1) ∘ W x: what DoRA makes of the base's rows."""
        if self.row_scale is None:
            return y_TF
        assert product_TF is not None
        change_EF = self.row_scale - 1
        change_TF = change_EF.sum(dim=0)[None]
        if routing is not None:
            change_TF = routing.dense_gates().to(change_EF.dtype) @ change_EF
        return y_TF + (change_TF * product_TF).to(y_TF.dtype)

    def _mixed(
        self, kernels: Backend, x: Tensor, routing: Routing | None, base: Base | None
    ) -> Tensor:
        """The update of the block's own experts, and the base's product."""
        gates_TK = index_TK = None
        if routing is not None:
            gates_TK = routing.gates
            index_TK = None if routing.in_order else routing.expert_index
        lora_B: Tensor = self.lora_B
        if self.row_scale is not None:
            # of float32: rounded twice, factors in low precision would lose a digit
            lora_B = lora_B * self.row_scale[:, :, None]
        factors = self.lora_A, lora_B, self.scaling
        if x.dim() == 3:
            # an input per expert: only the reference takes one; the option is documented as slow
            return reference.lora_mix(x, gates_TK, index_TK, *factors, base=base)
        plan = {}
        if routing is not None and index_TK is not None:
            plan = _plan(kernels, index_TK, self.size, routing.plans)
        return kernels.lora_mix(x, gates_TK, index_TK, *factors, base=base, **plan)

    def _read_out(self, x_TD: Tensor, readout_NEF: Tensor) -> Tensor:
        if self.columns is not None:
            readout_NEF = readout_NEF.index_select(1, self.columns)
        own, *others = blocks = list(self.blocks())
        parts = readout_NEF.split([block.size for block in blocks], dim=1)
        found_TM = own._read_out_of_block(x_TD, parts[0])
        for block, part in zip(others, parts[1:], strict=True):
            found_TM = found_TM + block(x_TD, None, readout_NEF=part)
        return found_TM

    def _read_out_of_block(self, x_TD: Tensor, readout_NEF: Tensor) -> Tensor:
        """As `forward`; the updates (T, E, out) are not made, as all is linear in A x of rank R."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        down_TER = torch.einsum("td,erd->ter", x_TD.to(dtype), self.lora_A.to(dtype))
        up_EFR = self.lora_B.to(dtype)
        if self.bias is not None:  # one more column of B, for which A x is 1
            up_EFR = torch.cat([up_EFR, self.bias.to(dtype)[:, :, None]], dim=2)
            down_TER = torch.cat([down_TER, torch.ones_like(down_TER[..., :1])], dim=2)
        up_EFR = self.scaling.to(dtype)[:, None, None] * up_EFR
        read_NER = torch.einsum("nef,efr->ner", readout_NEF.to(dtype), up_EFR)
        products_TN = down_TER.flatten(1) @ read_NER.flatten(1).T
        gram_ERR = up_EFR.mT @ up_EFR
        squares_T = (torch.einsum("ter,ers->tes", down_TER, gram_ERR) * down_TER).sum(dim=(1, 2))
        return torch.cat([products_TN, squares_T[:, None]], dim=1)

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def dropped_rows(self, x_TD: Tensor, expert_index_TK: Tensor) -> Tensor:
        """The input of `rows`: (T, in), or with a mask per expert (T·K, in)."""
        x_TD = x_TD.to(compute_dtype(x_TD))
        if not self._drops():
            return x_TD
        if self.dropout_mask == "per_expert":
            # a row with a mask of its own for every slot, since no expert has two slots of a row
            x_TD = x_TD.repeat_interleave(expert_index_TK.shape[1], dim=0)
        return nn.functional.dropout(x_TD, self.dropout)

    def rows(
        self,
        x: Tensor,
        expert_index_TK: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        plans: dict[str, Any] | None = None,
    ) -> Tensor:
        """(T, K, out): the ungated update of each slot, of `dropped_rows` and these factors.

        `plans` are those of the decision with these indices.
        """
        a_row_per_slot = x.shape[0] != expert_index_TK.shape[0]
        index = expert_index_TK.reshape(-1, 1) if a_row_per_slot else expert_index_TK
        kernels = self.kernels("lora_rows", x, index.shape[1])
        plan = _plan(kernels, index, self.size, {} if a_row_per_slot or plans is None else plans)
        delta = kernels.lora_rows(x, index, lora_A, lora_B, self.scaling, **plan)
        return delta.view(*expert_index_TK.shape, self._out_features)

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


def _plan(
    kernels: Backend, expert_index_TK: Tensor, num_experts: int, plans: dict[str, Any]
) -> dict[str, Any]:
    """How a backend sorts rows, once for all banks that share a decision and its `plans`."""
    if kernels.plan is None:
        return {}
    if kernels.name not in plans:
        plans[kernels.name] = kernels.plan(expert_index_TK, num_experts)
    return {"plan": plans[kernels.name]}


def acting(routing: Routing | None) -> int | None:
    """Experts that act on a row; None: all."""
    return None if routing is None or routing.in_order else routing.expert_index.shape[1]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)

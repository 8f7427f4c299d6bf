"""y = Σ_j w_j (W_j x + Σ_e gate_e · scaling_e · B_ej A_ej x) at a base's own experts j, whose
weights lie stacked in one parameter for each projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molora.errors import AttachError
from molora.experts import ExpertBank
from molora.experts.bank import acting
from molora.experts.gates import grown, of_largest
from molora.kernels.grouped_product import grouped_product
from molora.kernels.plan import plan_rows
from molora.modules.context import ForwardContext
from molora.modules.model_decision import ModelDecision
from molora.modules.site import RoutingSite, SharedDecision
from molora.routing.record import Routing

Decision = RoutingSite | SharedDecision | ModelDecision


@dataclass(frozen=True)
class Assigned:
    """The tokens that each of the base's experts got from the base's own router, sorted by expert.

    Attributes:
        token_N: the token of each row; N = T · K_b.
        expert_N: the base's expert of each row, ascending.
        offsets_G: where the rows of each expert end, int32.
        place_N: the place of each row among the T · K_b (token, slot).
    """

    token_N: Tensor
    expert_N: Tensor
    offsets_G: Tensor
    place_N: Tensor


def assigned(index_TK: Tensor, num_base: int) -> Assigned:
    """Sort the base's decision, (T, K_b) of its `num_base` experts, once for both projections."""
    plan = plan_rows(index_TK, num_base, grouping="slot")
    place_N = plan.order_N * index_TK.shape[1] + plan.slot_NS[:, 0]
    return Assigned(plan.order_N, plan.expert_NS[:, 0], plan.offsets_G, place_N)


class StackedProjection:
    """One parameter of stacked weights, and what experts add to each of them.

    Args:
        base: the module that has the parameter.
        name: of the parameter: (E_b, out, in), or (E_b, in, out) if `transposed`.
        transposed: how the weights lie.
        biased: whether the base adds `{name}_bias`, (E_b, out).
        experts: the bank of the pairs (expert e, weight j), numbered e · E_b + j; None if no expert
            adapts the parameter.
        decision: what decides; None if nothing does: all experts act with gate 1.
    """

    def __init__(
        self,
        base: nn.Module,
        name: str,
        *,
        transposed: bool,
        biased: bool,
        experts: ExpertBank | None,
        decision: Decision | None,
    ) -> None:
        self.base = base
        self.name = name
        self.transposed = transposed
        self.biased = biased
        self.experts = experts
        self.decision = decision

    def kind(self, num_base: int) -> tuple[object, ...]:
        """What `pairs` makes of a decision hangs on nothing else of the projection."""
        bank = self.experts
        assert bank is not None
        sizes = tuple(block.size // num_base for block in bank.blocks())
        columns = None if bank.columns is None else tuple(bank.columns[::num_base].tolist())
        return id(self.decision), sizes, columns, bank.grow_gates

    def pairs(self, routing: Routing, rows: Assigned, num_base: int) -> list[Routing]:
        """What a decision about tokens says of the rows and of the pairs in each of the blocks."""
        bank = self.experts
        assert bank is not None
        if bank.is_alone and bank.columns is None:
            return [_of_pairs(routing, rows, num_base)]
        gates_TE = routing.dense_gates()
        if bank.columns is not None:
            own_TE = gates_TE.index_select(1, bank.columns[::num_base] // num_base)
            gates_TE = grown(own_TE, gates_TE) if bank.grow_gates else own_TE
        parts = gates_TE.split([block.size // num_base for block in bank.blocks()], dim=1)
        slots = acting(routing)
        return [_of_pairs(of_largest(part_TE, slots), rows, num_base) for part_TE in parts]

    def product(self, x_ND: Tensor, rows: Assigned, gates: list[Routing] | None) -> Tensor:
        """(N, in) of sorted rows → (N, out) in the weights' dtype; `gates` decide for pairs."""
        weight = self.base.get_parameter(self.name)
        weights_GIO = weight if self.transposed else weight.transpose(1, 2)
        # autocast knows no grouped product; the base's own forward casts likewise
        y_NF = grouped_product(x_ND.to(weight.dtype), weights_GIO, rows.offsets_G)
        if self.biased:
            y_NF = y_NF + self.base.get_parameter(f"{self.name}_bias")[rows.expert_N]
        if self.experts is not None:
            y_NF = y_NF + self.experts(x_ND, gates).to(y_NF.dtype)
        return y_NF


class MoLoRAStackedExperts:
    """Takes over the forward of the module with a base's own experts.

    An expert adapts every weight of a stack with factors of its own, so (expert, weight) is a pair
    of which the token's gate for the expert and the base's choice of weights decide together. The
    gates are of tokens; the base's own router sees the hidden states as they are.

    Args:
        base_forward: the module's forward before it was taken over, (T, H), (T, K_b), (T, K_b) →
            (T, H).
        inner, outer: the projection that reads hidden states, and the one that leads back.
        num_base: E_b.
        num_experts: E.
        activate: (N, out) of the first → (N, in) of the second.
        finish: (N, H) → (N, H), before the base's weights w_j.
        context: shared state of the model's forward.
    """

    def __init__(
        self,
        base_forward: Callable[..., Tensor],
        inner: StackedProjection,
        outer: StackedProjection,
        *,
        num_base: int,
        num_experts: int,
        activate: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor], Tensor],
        context: ForwardContext,
    ) -> None:
        self.base_forward = base_forward
        self.inner = inner
        self.outer = outer
        self.num_base = num_base
        self.num_experts = num_experts
        self.activate = activate
        self.finish = finish
        self.context = context
        # read once, since it waits for the device
        self._kinds = [p.kind(num_base) if p.experts is not None else None for p in (inner, outer)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H) and the base's decision → (T, H); the base alone while disabled."""
        if not self.context.enabled:
            return self.base_forward(hidden_states, top_k_index, top_k_weights)
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        index_TK = top_k_index.reshape(len(x_TD), -1)
        if top_k_weights.numel() != index_TK.numel():
            raise AttachError(
                f"a base's experts were called with {tuple(top_k_index.shape)} indices and "
                f"{tuple(top_k_weights.shape)} weights; molora needs a weight for each index."
            )
        rows = assigned(index_TK, self.num_base)
        inner, outer = self._pairs(x_TD, rows)
        a_NI = self.activate(self.inner.product(x_TD.index_select(0, rows.token_N), rows, inner))
        y_NF = self.finish(self.outer.product(a_NI, rows, outer))
        y_NF = y_NF * top_k_weights.reshape(-1, 1).index_select(0, rows.place_N)
        # by place and then summed, as adding at indices has another order on every run on a GPU
        y_NF = y_NF.index_select(0, rows.place_N.argsort())
        y_TF = y_NF.view(*index_TK.shape, -1).sum(dim=1)
        return y_TF.to(hidden_states.dtype).view(hidden_states.shape)

    def _pairs(self, x_TD: Tensor, rows: Assigned) -> Iterator[list[Routing] | None]:
        """For each projection what is decided of pairs; once where they share it."""
        decided: dict[int, Routing] = {}
        made: dict[object, list[Routing]] = {}
        for projection, kind in zip((self.inner, self.outer), self._kinds, strict=True):
            if kind is None:
                yield None
                continue
            decision = projection.decision
            if id(decision) not in decided:
                decided[id(decision)] = self._decided(decision, x_TD)
            if kind not in made:
                made[kind] = projection.pairs(decided[id(decision)], rows, self.num_base)
            yield made[kind]

    def _decided(self, decision: Decision | None, x_TD: Tensor) -> Routing:
        """(T, H) → the decision for the tokens."""
        if decision is None:
            return _all_act(x_TD, self.num_experts)
        if isinstance(decision, RoutingSite):
            return decision.decide(x_TD.view(*self._grid(len(x_TD), decision.stream), -1))
        current = self.context.decisions.get(decision.site.name)
        if current is None or math.prod(current.grid) != len(x_TD):
            raise AttachError(
                f"{decision.site.name}: a decision was made for rows of shape "
                f"{'none' if current is None else current.grid}, but a base's experts were called "
                f"with {len(x_TD)} tokens. Call the model itself, not a part of it."
            )
        return current

    def _grid(self, rows: int, stream: str) -> tuple[int, ...]:
        """Leading shape of the batch that the base made one row of tokens of, where it is known."""
        side = self.context.side
        mask_BS = side.acting if side.acting is not None else side.masks.get(stream)
        batch, length = (1, 0) if mask_BS is None else mask_BS.shape[:2]
        # with a cache the mask is of earlier positions, too
        fits = batch > 0 and rows % batch == 0 and rows // batch <= length
        return (batch, rows // batch) if fits else (rows,)


def _of_pairs(routing: Routing, rows: Assigned, num_base: int) -> Routing:
    """(T, K) experts and gates → those of the rows, (N, K), experts as pairs with the row's weight;
    the plans that kernels make of them are kept there for the next projection."""
    index_NK = routing.expert_index.index_select(0, rows.token_N) * num_base
    index_NK = index_NK + rows.expert_N[:, None]
    gates_NK = routing.gates.index_select(0, rows.token_N)
    # scores say how many pairs there are, and are read no further
    scores_NP = gates_NK.new_zeros(1, 1).expand(len(index_NK), routing.num_experts * num_base)
    chosen_NK = torch.ones_like(index_NK, dtype=torch.bool)
    return Routing(None, scores_NP, gates_NK, index_NK, chosen_NK)


def _all_act(x_TD: Tensor, num_experts: int) -> Routing:
    index_TE = torch.arange(num_experts, device=x_TD.device).expand(len(x_TD), -1)
    gates_TE = torch.ones_like(index_TE, dtype=torch.float32)
    return Routing(None, gates_TE, gates_TE, index_TE, gates_TE.bool(), in_order=True)

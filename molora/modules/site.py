"""A site: one router, its selector, and the decision they make for the rows of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import AttachError
from molora.modules.context import ForwardContext
from molora.routing.record import Routing
from molora.routing.router import LinearRouter
from molora.routing.scores import ScoreFunction, identity
from molora.routing.select import SelectFunction, dense, limit_capacity


class RoutingSite:
    """x → Routing. Not a module: the router belongs to the module that owns the scope.

    Args:
        name: path of the owning module.
        router: module (T, in) → (T, E) float32.
        score, select: pure functions, see `routing/`.
        capacity: tokens that an expert serves per sequence in training; None for no limit.
        stream: whose padding mask its rows follow: "input", or "encoder" and "decoder" of a model
            that has both.
        context: shared state of the model's forward.
        slots: K, if the selector has as many for every row; None: one for every expert.
        gate_scale: multiplies the gates.

    A router with a buffer `present`, (E,) bool, says which experts can be chosen here.
    """

    def __init__(
        self,
        name: str,
        router: nn.Module,
        *,
        score: ScoreFunction,
        select: SelectFunction,
        capacity: int | None,
        stream: str,
        context: ForwardContext,
        slots: int | None = None,
        gate_scale: float = 1.0,
    ) -> None:
        self.name = name
        self.router = router
        self.score = score
        self.select = select
        self.capacity = capacity
        self.stream = stream
        self.context = context
        self.slots = slots
        self.gate_scale = gate_scale

    def linear_weight(self) -> Tensor | None:
        """The (E, in) weight of a router whose logits are made of its product with the input as it
        is, which another product may then contain."""
        router = self.router
        return router.weight if isinstance(router, LinearRouter) and router.is_product() else None

    def decide(self, x: Tensor, *, logits_TE: Tensor | None = None) -> Routing:
        """(..., in) → the decision for its rows; recorded if a trace is open.

        `logits_TE` is the product with `linear_weight()`, if it was made already.
        """
        grid = tuple(x.shape[:-1])
        if logits_TE is None:
            logits_TE = self.router(x.reshape(-1, x.shape[-1]))
        else:
            assert isinstance(self.router, LinearRouter)
            logits_TE = self.router.finish(logits_TE)
        return self.decide_by(logits_TE, grid)

    def decide_by(self, logits_TE: Tensor, grid: tuple[int, ...]) -> Routing:
        """The decision that follows from logits of rows with this leading shape; recorded if a
        trace is open."""
        present_E = getattr(self.router, "present", None)
        if present_E is not None:
            nothing = 0.0 if self.score is identity else -torch.inf
            logits_TE = logits_TE.masked_fill(~present_E, nothing)
        return self._decided(logits_TE, self.score(logits_TE), grid)

    def decide_by_scores(self, scores_TE: Tensor, grid: tuple[int, ...]) -> Routing:
        """The decision that follows from scores, which are not made from logits."""
        return self._decided(None, scores_TE, grid)

    def _decided(
        self, logits_TE: Tensor | None, scores_TE: Tensor, grid: tuple[int, ...]
    ) -> Routing:
        device, present_E = scores_TE.device, getattr(self.router, "present", None)
        gates_TK, index_TK, selected_TK = self.select(scores_TE)
        if present_E is not None:
            selected_TK = selected_TK & present_E[index_TK]
        if self.capacity is not None and self.router.training:
            gates_TK = limit_capacity(
                gates_TK,
                index_TK,
                num_experts=scores_TE.shape[-1],
                capacity=self.capacity,
                starts_T=self.context.side.starts(self.stream, grid, device),
                mask_T=self.context.side.rows(self.stream, grid),
            )
        if self.gate_scale != 1.0:
            gates_TK = gates_TK * self.gate_scale
        acting_TE = self.context.side.acting_rows(grid)
        if acting_TE is not None:
            gates_TK = gates_TK * acting_TE.gather(1, index_TK)
        routing = Routing(
            *(logits_TE, scores_TE, gates_TK, index_TK, selected_TK),
            grid=grid,
            in_order=self.select is dense,
        )
        if self.context.trace is not None:
            self.context.trace.setdefault(self.name, []).append(routing)
        return routing


class SharedDecision:
    """One decision for all linears below a block, made when the block is called.

    It lives in the forward context, from which `checkpoint_context` brings it back for a
    recomputation: the hooks of a decoder layer run outside of its checkpointed region.
    """

    def __init__(self, site: RoutingSite, *, in_features: int, num_experts: int) -> None:
        self.site = site
        self.in_features = in_features
        self.num_experts = num_experts

    @property
    def slots(self) -> int | None:
        """K of the block's decision; None: a slot for every expert."""
        return self.site.slots

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the block."""
        if not self.site.context.enabled:
            return
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.shape[-1] != self.in_features:
            raise AttachError(
                f"the router at {self.site.name!r} reads the block's hidden states with "
                f"{self.in_features} features, but the block was called with "
                f"{'nothing' if x is None else tuple(getattr(x, 'shape', ()))}. Use scope='linear' "
                "for this model."
            )
        self.site.context.decisions[self.site.name] = self.site.decide(x)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the block, also called when it raised."""
        self.site.context.decisions.pop(self.site.name, None)

    def decide(self, x: Tensor, *, logits_TE: Tensor | None = None) -> Routing:
        """The block's decision, for a linear below it whose input has the same rows."""
        current = self.site.context.decisions.get(self.site.name)
        if current is None or current.grid != tuple(x.shape[:-1]):
            raise AttachError(
                f"a linear that shares the decision of {self.site.name!r} was called outside of "
                f"it, or with rows of shape {tuple(x.shape[:-1])} that are not the block's. Use "
                "scope='linear' for this model."
            )
        return current

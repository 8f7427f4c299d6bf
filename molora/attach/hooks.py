"""Hooks on the model's own forward: open the trace, read masks, add the auxiliary losses once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from molora.attach import checkpointing
from molora.attach.caches import cache_of
from molora.attach.invocation import Invocations, acting_positions
from molora.attach.model_scope import FirstPass, GivenGates
from molora.attach.packing import PackedRows
from molora.attach.side_inputs import ArgumentReader, share
from molora.errors import AttachError
from molora.losses import AuxLosses, WeightedTerm, total
from molora.modules import ForwardContext, SideInputs
from molora.routing import Routing

Records = Mapping[str, Sequence[Routing]]
Observer = Callable[[Records], None]


@dataclass
class DeferredAux:
    """Auxiliary losses of one training step, for a caller that makes the loss itself."""

    forwards: list[tuple[AuxLosses, Tensor | None]] = field(default_factory=list)
    """Each forward's losses, and its number of supervised tokens."""

    def weighted(self, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Σ aux · share of supervised tokens, in the graph."""
        terms = [
            share(num_items_in_batch, supervised) * aux.weighted
            for aux, supervised in self.forwards
        ]
        return (
            torch.stack([torch.as_tensor(term) for term in terms]).sum()
            if terms
            else torch.zeros(())
        )


class ForwardHooks:
    """Everything that happens around a forward of the adapted model; nothing outlives the forward.

    Args:
        model: read for its argument names only.
        context: shared with the adapted modules.
        losses: auxiliary losses that enter the training loss.
        layers: site → layer.
        streams: site → stream whose padding mask its rows follow.
        required_columns: side columns without which training is refused.
        needs_context: whether recomputed layers read masks or shared decisions.
        model_scope: what decides for the whole model, before its forward.
        invocations: for each expert the tokens from which on it acts, if any has such.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        context: ForwardContext,
        losses: Sequence[WeightedTerm],
        layers: Mapping[str, str],
        streams: Mapping[str, str],
        required_columns: Sequence[str],
        needs_context: bool,
        model_scope: GivenGates | FirstPass | None = None,
        invocations: Invocations = (),
    ) -> None:
        self.arguments = ArgumentReader(model)
        self.packing = PackedRows(self.arguments, context)
        self.context = context
        self.losses = tuple(losses)
        self.layers = layers
        self.streams = streams
        self.required_columns = tuple(required_columns)
        self.needs_context = needs_context
        self.model_scope = model_scope
        self.invocations = invocations
        self.observers: list[Observer] = []
        self.columns: dict[str, Tensor] = {}
        self.deferred: DeferredAux | None = None

    def before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: masks and columns go to the context, columns do not go to the model."""
        if self._in_first_pass():
            return args, kwargs
        kwargs, columns = self.arguments.split_columns(kwargs)
        kwargs, sequences = self.packing.read(model, args, kwargs)
        if not self.context.enabled:
            return args, kwargs
        columns = {**self.columns, **columns}
        training = model.training and torch.is_grad_enabled()
        if training:
            checkpointing.check_checkpointing(model, needs_context=self.needs_context)
            self._check_columns(columns)
            self._check_fused_head(kwargs)
        self.context.side = self.arguments.side_inputs(args, kwargs, columns, sequences)
        self.context.trace = {} if self.observers or (training and self.losses) else None
        checkpointing.enter(self.context)
        return self._with_decisions(model, args, kwargs, columns)

    def _in_first_pass(self) -> bool:
        return isinstance(self.model_scope, FirstPass) and self.model_scope.running

    def _with_decisions(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        columns: Mapping[str, Tensor],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decide what is decided before the forward → its arguments, with another cache at most."""
        if self.model_scope is None and not self.invocations:
            return args, kwargs
        inputs = self.arguments.inputs(args, kwargs)
        if inputs is None:
            raise AttachError("the model was called without input_ids or inputs_embeds.")
        named, cache = self.arguments.by_name(args, kwargs), None
        if self.invocations or isinstance(self.model_scope, FirstPass):
            cache = cache_of(named, model)
        if self.invocations:
            if inputs.dim() != 2:
                raise AttachError(
                    "an expert acts only after certain tokens (aLoRA), so that the model must be "
                    "called with input_ids, not with inputs_embeds."
                )
            acting_BSE = acting_positions(inputs, self.invocations, cache)
            self.context.side = replace(self.context.side, acting=acting_BSE)
        grid = (inputs.shape[0], inputs.shape[1])
        if isinstance(self.model_scope, GivenGates):
            self.model_scope.decide(columns, grid)
        elif self.model_scope is not None:
            self.model_scope.decide(named, grid, cache)
        changes = {} if cache is None else {"past_key_values": cache}
        return self.arguments.replaced(args, kwargs, changes)

    def after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Forward hook, also called after an error: auxiliary losses enter the output's loss."""
        if self._in_first_pass():
            return output
        trace, side = self.context.trace, self.context.side
        self.context.trace, self.context.side = None, SideInputs()
        self.context.decisions.clear()
        checkpointing.leave(self.context)
        if output is None or not self.context.enabled:
            return output if output is None else with_aux(output, None)
        records = {
            site: [_in_batch(r, side, self.streams[site]) for r in site_records]
            for site, site_records in (trace or {}).items()
        }
        for observe in self.observers:
            observe(records)
        if not (model.training and torch.is_grad_enabled() and self.losses and records):
            return with_aux(output, None)
        aux = total(records, self.losses, layer_of=self.layers, side=side.columns)
        supervised = self.arguments.supervised(args, kwargs)
        if self.deferred is not None:
            self.deferred.forwards.append((aux, supervised))
            return output
        return with_aux(output, share(kwargs.get("num_items_in_batch"), supervised) * aux.weighted)

    def _check_columns(self, columns: Mapping[str, Tensor]) -> None:
        for name in self.required_columns:
            if name not in columns:
                raise AttachError(
                    f"training this mixture needs the column {name!r}, one integer per sequence, "
                    f"for its auxiliary loss. Pass model(..., {name}=tensor) or "
                    f"mixture.context({name}=tensor), or turn the loss off with losses=(). "
                    "Evaluation and generation do not need it."
                )

    def _check_fused_head(self, kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("fused_lm_head") and self.losses and self.deferred is None:
            raise AttachError(
                "a trainer with a fused LM head makes its loss itself and would drop the "
                "auxiliary losses silently. Train with molora.train.SFTTrainer, or turn them off "
                "with losses=()."
            )


def _in_batch(record: Routing, side: SideInputs, stream: str) -> Routing:
    return replace(
        record,
        mask=side.rows(stream, record.grid),
        segment_ids=side.segment_rows(stream, record.grid),
    )


def with_aux(output: Any, aux: Tensor | None) -> Any:
    """The model's output with `aux` added to its loss, and as `aux_loss` (None outside training).

    Where the output class has a field of that name (mixture-of-experts bases), ours is
    `molora_aux_loss`.
    """
    if isinstance(output, tuple):
        has_loss = (
            aux is not None
            and len(output) > 0
            and isinstance(output[0], Tensor)
            and output[0].dim() == 0
        )
        return (output[0] + aux, *output[1:]) if has_loss else output
    if not hasattr(output, "keys"):
        return output
    taken = "aux_loss" in getattr(output, "__dataclass_fields__", {})
    object.__setattr__(output, "molora_aux_loss" if taken else "aux_loss", aux)
    if aux is not None and getattr(output, "loss", None) is not None:
        output["loss"] = output["loss"] + aux.to(output["loss"].device)
    return output

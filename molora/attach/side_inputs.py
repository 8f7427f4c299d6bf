"""From a forward's arguments to padding masks, side columns and a micro-batch's share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from molora.attach.packing import Sequences
from molora.config.data import SIDE_COLUMNS
from molora.modules import SideInputs

SIDE_INPUTS = (*SIDE_COLUMNS, "expert_gates")
"""What a forward takes for the mixture and not for the base."""


class ArgumentReader:
    """Finds named arguments of a model's forward, passed by position or by name."""

    def __init__(self, model: nn.Module) -> None:
        self.names = [
            name for name in inspect.signature(type(model).forward).parameters if name != "self"
        ]
        self.is_encoder_decoder = bool(
            getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        )
        self.shifts_labels = (
            not self.is_encoder_decoder and getattr(model, "loss_type", None) == "ForCausalLM"
        )

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
        """The argument called `name`, or None."""
        if name in kwargs:
            return kwargs[name]
        position = self.names.index(name) if name in self.names else len(args)
        return args[position] if position < len(args) else None

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], changes: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other values, each in the way in which it was passed."""
        positional = dict(zip(self.names, args, strict=False))
        args = tuple(changes.get(name, value) for name, value in positional.items())
        named = {name: value for name, value in changes.items() if name not in positional}
        return args, {**kwargs, **named}

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """(B, S) token ids or (B, S, in) embeddings; None if the model takes neither."""
        ids = self.get(args, kwargs, "input_ids")
        return ids if ids is not None else self.get(args, kwargs, "inputs_embeds")

    def split_columns(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Take out the side columns that the model has no argument for."""
        columns = {
            name: kwargs[name]
            for name in SIDE_INPUTS
            if name in kwargs and name not in self.names and kwargs[name] is not None
        }
        return {
            name: value
            for name, value in kwargs.items()
            if name not in SIDE_INPUTS or name in self.names
        }, columns

    def side_inputs(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        columns: Mapping[str, Tensor],
        sequences: Sequences | None = None,
    ) -> SideInputs:
        """Padding masks by stream, and the sequences of packed rows.

        Without a decoder_attention_mask, the decoder positions of an encoder-decoder that count are
        those with a label.
        """
        if sequences is not None:
            padding = {} if sequences.mask_BS is None else {"input": sequences.mask_BS}
            return SideInputs(masks=padding, columns=columns, segments=sequences.numbers_BS)
        mask = self.get(args, kwargs, "attention_mask")
        unreadable = _unreadable(mask)
        if unreadable:
            return SideInputs(columns=columns, unreadable=unreadable)
        masks: dict[str, Tensor] = {}
        if mask is not None:
            masks["encoder" if self.is_encoder_decoder else "input"] = mask.bool()
        if self.is_encoder_decoder:
            decoder_mask = self.get(args, kwargs, "decoder_attention_mask")
            labels = self.get(args, kwargs, "labels")
            if decoder_mask is not None:
                masks["decoder"] = decoder_mask.bool()
            elif labels is not None:
                masks["decoder"] = labels != -100
        return SideInputs(masks=masks, columns=columns)

    def supervised(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Number of labels that this micro-batch's loss counts, as transformers' Trainer does."""
        shifted = self.get(args, kwargs, "shift_labels")
        labels = shifted if shifted is not None else self.get(args, kwargs, "labels")
        if labels is None:
            return None
        if shifted is None and self.shifts_labels:
            labels = labels[..., 1:]
        return (labels != -100).sum()


def _unreadable(mask: Any) -> str:
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return ""
    if isinstance(mask, Tensor):
        return f"a {mask.dim()}-D tensor"
    return f"a {type(mask).__name__}"


def share(num_items_in_batch: Tensor | int | None, supervised: Tensor | None) -> Tensor | float:
    """The weight of a micro-batch's auxiliary loss.

    Its share of the batch's supervised tokens, 1 if it is the batch.

    With this weight the auxiliary gradient is invariant to accumulation and world size, like the
    cross entropy's.
    """
    if num_items_in_batch is None or supervised is None:
        return 1.0
    total = torch.as_tensor(num_items_in_batch, device=supervised.device)
    return supervised / total.clamp_min(1)

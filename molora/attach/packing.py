"""Several sequences in one row: what keeps them apart in the base, and which bases can."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from molora.errors import AttachError
from molora.modules import ForwardContext

if TYPE_CHECKING:
    from molora.attach.side_inputs import ArgumentReader

SEGMENT_IDS = "segment_ids"
"""(B, S) integers of a packed batch, for the mixture and not for the base: equal within a sequence,
other than the neighbours', 0 on padding."""

TOLERATED_LEAK = 0.1
"""In bfloat16 experts of a base may round differently with the number of their rows."""

_ATTENTIONS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Sequences:
    """The sequences in the rows of a batch."""

    numbers_BS: Tensor
    """(B, S) int64, counted through the batch from 1; 0 on padding."""
    mask_BS: Tensor | None
    """(B, S) bool, False on padding; None where nothing is known to be padding."""


class PackedRows:
    """Reads which sequences are in a row, and sees to it that the base keeps them apart.

    transformers makes attention block-diagonal where positions do not go up by one, if it gets
    positions, no attention mask, and no cache. By default it makes a cache, in training too, and
    with one every sequence silently sees those before it in its row. So ``segment_ids`` set the
    positions and turn the cache off, and positions alone turn it off wherever a loss is made.
    """

    def __init__(self, reader: ArgumentReader, context: ForwardContext) -> None:
        self.reader = reader
        self.context = context
        self._refusals: dict[object, str] = {}

    def read(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Sequences | None]:
        """A forward's keyword arguments for the base, without ``segment_ids``, and the sequences;
        None where the base takes a row for one sequence.

        Raises:
            AttachError: ``segment_ids`` that do not fit the other arguments, or for a base that
                cannot keep sequences apart.
        """
        kwargs, names = dict(kwargs), self.reader.names
        segment_ids = None if SEGMENT_IDS in names else kwargs.pop(SEGMENT_IDS, None)
        if segment_ids is not None:
            self._check(model, args, kwargs, segment_ids)
            begins_BS, positions_BS = _begins_and_positions(segment_ids)
            kwargs |= {"position_ids": positions_BS, "use_cache": False}
            mask_BS = segment_ids != 0
            return kwargs, Sequences(_numbered(begins_BS & mask_BS) * mask_BS, mask_BS)
        given = partial(self.reader.get, args, kwargs)
        positions = given("position_ids")
        if not isinstance(positions, Tensor) or positions.dim() != 2:
            return kwargs, None
        if given("attention_mask") is not None or given("past_key_values") is not None:
            return kwargs, None
        use_cache = given("use_cache")
        if use_cache is None and "use_cache" in names:
            if model.training or given("labels") is not None:
                kwargs["use_cache"] = use_cache = False
            else:
                use_cache = getattr(getattr(model, "config", None), "use_cache", False)
        if use_cache or self.reader.is_encoder_decoder:
            return kwargs, None
        inputs = self.reader.inputs(args, kwargs)
        positions_BS = positions if inputs is None else positions.expand(inputs.shape[0], -1)
        # the prepended column makes a row's first difference 0
        begins_BS = positions_BS.diff(dim=1, prepend=positions_BS[:, :1]) != 1
        return kwargs, Sequences(_numbered(begins_BS), None)

    def _check(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        segment_ids: Tensor,
    ) -> None:
        reason = self._refusal(model)
        if reason:
            raise AttachError(
                f"{SEGMENT_IDS}: sequences packed into one row cannot be kept apart: {reason}. "
                "Give every sequence a row of its own."
            )
        for name in ("attention_mask", "past_key_values", "use_cache"):
            given = self.reader.get(args, kwargs, name)
            if given is not None and given is not False:
                raise AttachError(
                    f"{SEGMENT_IDS} came with {name}, with which the base would let each sequence "
                    "see those before it in its row. Leave it out: padding is where segment_ids "
                    "are 0, and a cache is for generation."
                )
        inputs = self.reader.inputs(args, kwargs)
        if inputs is not None and segment_ids.shape != inputs.shape[:2]:
            raise AttachError(
                f"{SEGMENT_IDS} have shape {tuple(segment_ids.shape)}, but the batch is "
                f"{tuple(inputs.shape[:2])}. Give one number per token."
            )

    def _refusal(self, model: nn.Module) -> str:
        """Found out once for every attention implementation, at its first packed forward."""
        attention = attention_of(model)
        if attention not in self._refusals:
            reason = refusal(model)
            # families that take positions do not all pass them on to their masks: in transformers
            # 5.23 OPT, Falcon and GPT-OSS do not
            if not reason and (seen := self._leak(model)) > TOLERATED_LEAK:
                reason = (
                    f"measured on this model, a sequence sees {100 * seen:.0f} % of what it would "
                    "see of the one before it if they were one"
                )
            self._refusals[attention] = reason
        return self._refusals[attention]

    def _leak(self, model: nn.Module) -> float:
        attention, enabled = attention_of(model), self.context.enabled
        # its forwards are packed too; and they are the base's, so that nobody who watches the
        # mixture sees them
        self._refusals[attention], self.context.enabled = "", False
        try:
            return leak(model)
        finally:
            del self._refusals[attention]
            self.context.enabled = enabled


def attention_of(model: nn.Module) -> object:
    """The name of the base's attention implementation; None if it has none."""
    return getattr(_text_config(model), "_attn_implementation", None)


def refusal(model: nn.Module) -> str:
    """Why the base cannot keep the sequences of a row apart; empty if nothing speaks against it.

    It looks at the model; :func:`leak` runs it, once it is known here that it can.
    """
    attention = attention_of(model)
    layers = getattr(_text_config(model), "layer_types", None) or ()
    kinds = sorted(kind for kind in set(layers) if kind not in _ATTENTIONS)
    generates = getattr(model, "can_generate", None)
    if generates is None or not generates() or _text_config(model).is_encoder_decoder:
        return f"{type(model).__name__} is no causal language model of transformers"
    if attention not in ("sdpa", "eager"):
        return f"masks by sequence are untested with attention {attention!r}; use sdpa or eager"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{type(model).__name__} takes no position_ids, by which attention tells them apart"
    if kinds:
        return f"layers of kind {kinds[0]!r} carry a state from one sequence into the next"
    return ""


@torch.no_grad()
def leak(model: Any) -> float:
    """How much a sequence sees of the one before it in its row, between 0 and about 1.

    The greatest change of its logits when all of the other one's tokens change, relative to the
    change when both are one sequence. Runs the model in evaluation four times, on 16 tokens.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(24, device=device) * 7 % vocabulary
    rows = [torch.cat([first, tokens[16:]])[None] for first in (tokens[:8], tokens[8:16])]
    apart = torch.arange(16, device=device)[None] // 8 + 1
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        changes = []
        for segments in (apart, torch.ones_like(apart)):
            one, other = (model(input_ids=r, segment_ids=segments).logits[0, 8:] for r in rows)
            changes.append(float((one - other).abs().max()))
    finally:
        for module, training in was_training.items():
            module.training = training
    packed, joined = changes
    return packed / joined if joined else float(packed > 0)


def _begins_and_positions(segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S) bool, where a sequence or padding begins, and (B, S) int64, the place in it."""
    begins_BS = torch.ones_like(segment_ids, dtype=torch.bool)
    begins_BS[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    place_S = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    first_BS = torch.where(begins_BS, place_S, 0).cummax(dim=1).values
    return begins_BS, place_S - first_BS


def _numbered(begins_BS: Tensor) -> Tensor:
    return begins_BS.flatten().cumsum(dim=0).view(begins_BS.shape)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config

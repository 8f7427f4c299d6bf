"""Activated LoRA: experts that act from the last occurrence of their tokens on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molora.attach.caches import PairedCache

Invocations = Sequence[tuple[int, ...] | None]
"""For each expert the token ids from which on it acts; None: always."""


def acting_positions(ids_BS: Tensor, invocations: Invocations, cache: PairedCache | None) -> Tensor:
    """(B, S, E) bool: where each expert acts (aLoRA, 2504.12397).

    The tokens themselves are included; without them the expert does not act. An expert that a
    cache's earlier positions have called acts on; tokens that a model writes itself call none
    unless they come in one forward, as in package peft.

    Args:
        ids_BS: token ids of this forward.
        invocations: for each expert its tokens.
        cache: remembers who acts, where the positions go on from earlier ones.
    """
    columns = [_from_last(ids_BS, tokens) for tokens in invocations]
    acting_BSE = torch.stack(columns, dim=-1)
    if cache is None:
        return acting_BSE
    if cache.acting_BE is not None:
        # a call in this forward is later than those before
        goes_on_BE = cache.acting_BE & ~acting_BSE.any(dim=1)
        acting_BSE = acting_BSE | goes_on_BE[:, None]
    cache.acting_BE = acting_BSE[:, -1]
    return acting_BSE


def _from_last(ids_BS: Tensor, tokens: tuple[int, ...] | None) -> Tensor:
    """(B, S) bool: positions from the last occurrence of the tokens on."""
    length = ids_BS.shape[1]
    if tokens is None:
        return torch.ones_like(ids_BS, dtype=torch.bool)
    if len(tokens) > length:
        return torch.zeros_like(ids_BS, dtype=torch.bool)
    wanted = torch.tensor(tokens, device=ids_BS.device)
    starts_BP = (ids_BS.unfold(1, len(tokens), 1) == wanted).all(dim=-1)
    position_P = torch.arange(starts_BP.shape[1], device=ids_BS.device)
    found_B1 = starts_BP.any(dim=1, keepdim=True)
    last_B1 = torch.where(starts_BP, position_P, -1).amax(dim=1, keepdim=True)
    return found_B1 & (torch.arange(length, device=ids_BS.device) >= last_B1)

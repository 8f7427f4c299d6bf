"""A key-value cache that has what a mixture must remember beside it, row for row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from molora.errors import AttachError


class PairedCache(DynamicCache):
    """A model's cache, and for the same positions that of a first pass and the rows' memory.

    Caches become one in place (`paired`), so that whoever made one keeps it; what is done to the
    rows of one is done to both.
    """

    first_pass: DynamicCache
    acting_BE: Tensor | None
    """Experts that act from now on, where that depends on tokens that were seen."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.first_pass.reorder_cache(beam_idx)
        self._change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self.first_pass.crop(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.first_pass.batch_repeat_interleave(repeats)
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.first_pass.batch_select_indices(indices)
        self._change_rows(lambda rows: rows[indices])

    def reset(self) -> None:
        super().reset()
        self.first_pass.reset()
        self.acting_BE = None

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.acting_BE is not None:
            self.acting_BE = change(self.acting_BE)


def cache_of(arguments: Mapping[str, Any], model: nn.Module) -> PairedCache | None:
    """The cache of a forward with these arguments, which from here on remembers more; None where
    nothing is to be kept.

    Raises:
        AttachError: as `paired`.
    """
    config = getattr(model, "config", None)
    cache, wanted = arguments.get("past_key_values"), arguments.get("use_cache")
    if cache is None:
        wanted = getattr(config, "use_cache", False) if wanted is None else wanted
        if not wanted or torch.is_grad_enabled() or model.training:
            return None
    return paired(cache, config)


def paired(cache: Any, config: Any) -> PairedCache:
    """`cache`, which from here on remembers more; a new one if it is None.

    Raises:
        AttachError: a cache of another kind, or one that was filled without this mixture.
    """
    if isinstance(cache, PairedCache):
        return cache
    if cache is None:
        cache = DynamicCache(config=config)
    if type(cache) is not DynamicCache:
        raise AttachError(
            f"this mixture keeps more than keys and values of past positions, which a "
            f"{type(cache).__name__} cannot hold. Use transformers' DynamicCache, the default of "
            "generate, or use_cache=False."
        )
    if cache.get_seq_length() > 0:
        raise AttachError(
            f"past_key_values hold {cache.get_seq_length()} positions that this mixture has not "
            "seen. Start from an empty cache with the mixture on the model."
        )
    cache.__class__ = PairedCache
    cache.first_pass = DynamicCache(config=config)
    cache.acting_BE = None
    return cache


def check_in_step(cache: PairedCache) -> None:
    """Raise AttachError unless both passes have seen the same positions: some may have been filled
    while the mixture was disabled or not used."""
    own, first = cache.get_seq_length(), cache.first_pass.get_seq_length()
    if own != first:
        raise AttachError(
            f"past_key_values hold {own} positions, but the first pass has seen {first}: some were "
            "filled while the mixture was disabled. Start from an empty cache."
        )

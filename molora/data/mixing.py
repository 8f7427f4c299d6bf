"""How many examples of each source an epoch has, and which.

An epoch has as many examples as all sources together. Each source gets its share of them, by
weights or by temperature, rounded to whole examples by the largest remainder. A source of n
examples that gets c of them gives each c // n times, and c mod n of them, drawn without
replacement, once more. So no example of a source comes twice before all others of it came once.

What is drawn follows from the configuration, the number of examples and the seed alone, and is
settled before training as a list of indices: it is the same on every rank, for every world size and
after a resume. It is the same in every epoch too; the trainer's sampler shuffles each anew. Whoever
wants other examples of a source that is cut short trains one epoch of it, or gives it more weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from molora.config.data import DataConfig
from molora.errors import DataError


def drawn_per_epoch(config: DataConfig, sizes: Sequence[int]) -> list[int]:
    """Examples of each training source in an epoch, of ``sizes[i]`` that it has; sums to their sum.

    Raises:
        DataError: for a source that is to have a share, and has no example or would get none.
    """
    if config.temperature is not None:
        # n^(1/T), Raffel et al., 1910.10683, section 3.5.2
        relative = [Fraction(size ** (1 / config.temperature)) for size in sizes]
    elif config.train[0].weight is not None:
        relative = [Fraction(source.weight or 0) for source in config.train]
    else:
        return list(sizes)
    counts = largest_remainder(relative, sum(sizes))
    for source, share, size, count in zip(config.train, relative, sizes, counts, strict=True):
        if share and not (size and count):
            raise DataError(
                f"{source.shown} has {size:,} examples within max_length and would get {count:,} "
                f"of the {sum(sizes):,} of an epoch, for its share is "
                f"{float(share / sum(relative)):.2g}. Raise its weight, or take the source out."
            )
    return counts


def largest_remainder(relative: Sequence[Fraction], total: int) -> list[int]:
    """``total`` in whole parts as ``relative`` as can be; of equal remainders the first goes up."""
    quotas = [total * share / sum(relative) for share in relative]
    counts = [floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def epoch_indices(sizes: Sequence[int], counts: Sequence[int], seed: int) -> Tensor:
    """The places of an epoch's examples in the sources joined, source by source.

    Returns:
        (sum of counts,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    parts, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        order = torch.randperm(size, generator=generator)
        passes, rest = divmod(count, size) if size else (0, 0)
        parts += [start + torch.arange(size)] * passes
        parts.append(start + order[:rest].sort().values)
        start += size
    return torch.cat(parts)

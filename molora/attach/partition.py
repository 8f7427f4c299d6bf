"""Parameters that an engine divides over the ranks (ZeRO-3): between their uses they are empty."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from molora.errors import CheckpointError


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Its shape as a whole, which DeepSpeed writes down."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def check_whole(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise CheckpointError naming a parameter whose values are not here."""
    for name, parameter in named:
        if parameter.numel() == 0 and 0 not in whole_shape(parameter):
            raise CheckpointError(
                f"{name} is divided over the ranks by ZeRO-3, and empty here. Read it with "
                "molora.train.gather.gathered_state(mixture), called on all ranks; change it "
                "before the engine is made, or inside molora.train.gather.gathered(parameters, "
                "modifier_rank=0)."
            )

"""What a run minimises besides auxiliary losses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from molora.config.base import Frozen
from molora.config.shorthand import AlsoAs


class SFT(Frozen):
    """Cross entropy of the answers (supervised fine-tuning)."""

    kind: Literal["sft"] = "sft"


class DPO(Frozen):
    """Direct preference optimisation (2305.18290); rows have `chosen` and `rejected` answers.

    The reference is the base model: the mixture turned off, no second model in memory. Dropout is
    off, of experts too.
    """

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """How far the model is held to the base: a log-ratio counts this much as a reward."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid: DPO's own. hinge: SLiC's margin (2305.10425). ipo: squared distance of the
    log-ratio per token from 1/(2 beta) (2310.12036)."""
    aux_losses: bool = False
    """Add the mixture's auxiliary losses, over the chosen and the rejected sequences alike; a
    micro-batch's count by its share of the pairs, as its preference loss does."""


Objective = Annotated[
    Annotated[SFT | DPO, Field(discriminator="kind")],
    BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
    AlsoAs(({"enum": ["sft", "dpo"]},)),
]
"""`sft` stands for `{kind: sft}`."""

"""How the experts of a bank are parametrised."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from molora.config.base import Frozen


class Dropout(Frozen):
    """Dropout on what the experts read; the router always reads the undropped input."""

    p: float = Field(default=0.0, ge=0, lt=1)
    """Probability that an input feature is dropped in training."""
    mask: Literal["shared", "per_expert"] = "shared"
    """One mask per linear, or one per expert as LoRAMoE's and MoLA's code does (several times
    slower)."""


class LoRA(Frozen):
    """Independent factors per expert: ΔW_e = scaling_e · B_e A_e."""

    kind: Literal["lora"] = "lora"
    alpha: PositiveFloat | tuple[PositiveFloat, ...] = 16.0
    """Numerator of the scaling; a list gives one value per expert."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """alpha/r as in LoRA (2106.09685), or alpha/√r as in rsLoRA (2312.03732)."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """A starts kaiming-uniform (a = √5) or normal with std 1/r; B starts at zero."""
    dropout: Dropout = Dropout()
    """Dropout on the experts' input."""


class SharedA(Frozen):
    """One down-projection for all experts of a bank.

    ΔW_e = scaling_e · B_e A (HydraLoRA, 2404.19245).
    """

    kind: Literal["shared_a"] = "shared_a"
    alpha: PositiveFloat | tuple[PositiveFloat, ...] = 16.0
    """Numerator of the scaling; a list gives one value per expert."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """alpha/r as in LoRA (2106.09685), or alpha/√r as in rsLoRA (2312.03732)."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """A starts kaiming-uniform (a = √5) or normal with std 1/r; B starts at zero."""
    dropout: Dropout = Dropout()
    """Dropout on the experts' input."""


ExpertForm = Annotated[LoRA | SharedA, Field(discriminator="kind")]

"""How the experts of a bank are parametrised."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

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


class ImportedExpert(Frozen):
    """One adapter among the experts: trained elsewhere, or new and as yet untrained."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    """What the expert is called."""
    modules: dict[str, tuple[PositiveInt, float]] = Field(min_length=1)
    """Path of each linear or stacked parameter that it adapts → its rank there, and its scaling."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Storage of its factors."""
    trainable: bool = False
    """Whether its factors get gradients."""
    has_bias: bool = False
    """Whether a bias is added to B A x before scaling and gate (lora_bias of package peft)."""
    has_magnitude: bool = False
    """Whether the rows of the adapted weight have norms of their own (DoRA, 2402.09353)."""
    invocation_tokens: tuple[int, ...] | None = None
    """Token ids from whose last occurrence on the expert acts (aLoRA, 2504.12397); None: always."""
    base: str | None = None
    """The base that it was trained on, as its trainer called it."""
    revision: str | None = None
    """The revision of that base."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Hash of the file that its factors came from; None for a new expert."""


class Imported(Frozen):
    """Experts of any ranks on any linears, each with the factors that it brings.

    ΔW_e = scaling_e · B_e A_e.
    """

    kind: Literal["imported"] = "imported"
    experts: tuple[ImportedExpert, ...] = Field(min_length=1)
    """The experts in the order of the router's outputs."""
    stacked: dict[str, PositiveInt] = Field(default_factory=dict)
    """Paths that are no linears but parameters of a base that is itself a mixture of experts → the
    number of its weights in them. An expert has factors for each."""
    missing: Literal["mask", "renorm", "zero"] = "mask"
    """What an expert's part becomes at a linear that it does not adapt. mask: the linear's router
    cannot choose it. renorm: the gates of the others grow to the same sum. zero: it is lost."""
    dropout: Dropout = Dropout()
    """Dropout on the experts' input."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [expert.name for expert in self.experts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two experts are called {twice!r}. Give each a name of its own.")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The experts in order."""
        return tuple(expert.name for expert in self.experts)


ExpertForm = Annotated[LoRA | SharedA | Imported, Field(discriminator="kind")]

"""An adapter that others trained, as plain data: what it adds to which part of a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """How an adapter acts on one module: y += scaling · (B A x + bias).

    Attributes:
        lora_A: (R, in), in the type of the file.
        lora_B: (out, R).
        scaling: alpha / R, or alpha / sqrt(R) with rsLoRA, by the patterns that hold here.
        update_norm: Frobenius norm of scaling · B A.
        bias: (out,), with `lora_bias`.
        magnitude: (out,), with DoRA (arXiv 2402.09353, eq. 5): with c the magnitude over the norms
            of the rows of W + scaling · B A, y += (c - 1) ∘ W x + c ∘ scaling · B A x.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    update_norm: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]


@dataclass(frozen=True, eq=False)
class ExpertParameter:
    """How an adapter acts on a parameter of stacked weights: W_e += scaling · B_e A_e.

    The base has E weights in one parameter, which maps (…, in) to (…, out): as (E, out, in), or as
    (E, in, out) where its module says `is_transposed`; a parameter of two dimensions, (out, in),
    has E = 1.

    Attributes:
        lora_A: (E, R, in), a view of what the file holds.
        lora_B: (E, out, R), likewise; not contiguous.
        scaling: as in `AdapterModule`.
        update_norm: Frobenius norm of scaling · B_e A_e over all e.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    update_norm: float

    @property
    def num_experts(self) -> int:
        """E, of the base."""
        return self.lora_A.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[1]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter as it was read.

    Attributes:
        source: the directory.
        modules: by the module's name in the base, in the order of the file.
        base: the base as the trainer called it; None if it was not said.
        revision: the base's revision; None if it was not said.
        fan_in_fan_out: the adapted weights of the base are (in, out); for merging only.
        sha256: of the file with the tensors.
        notes: what was set aside, and where configuration and tensors differ.
        invocation_tokens: token ids of an activated LoRA (arXiv 2504.12397): the adapter acts from
            the start of the last place where they follow each other, and nowhere without one. None:
            it acts everywhere.
        parameters: by the parameter's name in the base: stacked weights of a base that is itself a
            mixture of experts.
    """

    source: Path
    modules: Mapping[str, AdapterModule]
    base: str | None
    revision: str | None
    fan_in_fan_out: bool
    sha256: str
    notes: tuple[str, ...]
    invocation_tokens: tuple[int, ...] | None = None
    parameters: Mapping[str, ExpertParameter] = field(default_factory=lambda: MappingProxyType({}))

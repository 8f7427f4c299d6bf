"""Settings of routers that are made from texts, as plain data."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveInt

from molora.compose.classifier import Classes, TopPClasses
from molora.compose.encoder import Keep
from molora.compose.retrieval import TopKMean, Weights
from molora.compose.search import BOUND, BUDGET, Method
from molora.config.base import Frozen


class ByRetriever(Frozen):
    """Router retriever."""

    weights: Weights = Field(default_factory=TopKMean)
    """How cosines become gates."""
    every: PositiveInt | None = None
    """Tokens for which gates stay while text is written; None: those of the prompt stay."""
    instruction: str = ""
    """Put before every text."""
    keep: Keep | None = None
    """The part of a text too long for the encoder that counts; with `every` the end."""


class ByClassifier(Frozen):
    """Router classifier."""

    select: Classes = Field(default_factory=TopPClasses)
    """How probabilities become gates."""
    every: PositiveInt | None = None
    """Tokens for which gates stay while text is written; None: those of the prompt stay."""
    keep: Keep = "end"
    """The part of a text too long for the encoder that counts."""


class Search(Frozen):
    """How weights are searched."""

    budget: PositiveInt = BUDGET
    """Weights that are tried."""
    seed: int = Field(default=0, ge=0)
    """Of whatever the method draws."""
    bound: float = BOUND
    """Of each weight's size."""
    method: Method = "auto"
    """As in `molora.compose.search`."""
    strength: NonNegativeFloat | None = None
    """Of the penalty on mean |w|; None: 0.05 · examples."""


class BySearch(Frozen):
    """Router lorahub."""

    search: Search = Field(default_factory=Search)
    """How weights are searched."""


Settings = ByRetriever | ByClassifier | BySearch
KINDS: dict[str, type[Settings]] = {
    "retriever": ByRetriever,
    "classifier": ByClassifier,
    "lorahub": BySearch,
}
"""Name of a router from texts → its settings."""

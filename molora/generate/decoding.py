"""How the next token is chosen, as data."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveInt

from molora.config import Frozen


class Decoding(Frozen):
    """Settings of generation; all others are those of the base model's generation config."""

    max_new_tokens: PositiveInt = 256
    """Tokens that are written at most, per prompt."""
    temperature: NonNegativeFloat = 0.0
    """Divides the logits of the tokens that are drawn from; 0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest tokens whose probabilities reach this sum."""
    num_beams: PositiveInt = 1
    """Continuations that are kept in beam search; 1 is none."""
    seed: int = Field(default=0, ge=0)
    """Seeds the draws; the same prompts in the same order give the same texts."""
    batch_size: PositiveInt = 8
    """Prompts that are continued together."""

"""Text from an adapted model, and the likelihood that it gives to texts. Nothing here trains."""

from molora.generate.load import Loaded, load_for_generation
from molora.generate.score import completion_loss, score_choices
from molora.generate.text import generate_texts

__all__ = [
    "Loaded",
    "completion_loss",
    "generate_texts",
    "load_for_generation",
    "score_choices",
]

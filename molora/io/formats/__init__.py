"""What other programs store of mixtures of adapters → plain data, every value checked."""

from molora.io.formats.arrow import ArrowSettings, read_arrow
from molora.io.formats.kohya import read_kohya
from molora.io.formats.lorahub import read_lorahub_weights
from molora.io.formats.mergekit import Prompts, PromptSettings, read_mergekit_prompts
from molora.io.formats.mergoo import MergooExpert, MergooSettings, read_mergoo
from molora.io.formats.phatgoose import read_gate_vectors, write_gate_vectors
from molora.io.formats.xlora import XLora, XLoraSettings, read_xlora
from molora.io.formats.xlora_classifier import Dense

__all__ = [
    "ArrowSettings",
    "Dense",
    "MergooExpert",
    "MergooSettings",
    "PromptSettings",
    "Prompts",
    "XLora",
    "XLoraSettings",
    "read_arrow",
    "read_gate_vectors",
    "read_kohya",
    "read_lorahub_weights",
    "read_mergekit_prompts",
    "read_mergoo",
    "read_xlora",
    "write_gate_vectors",
]

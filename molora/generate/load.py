"""From an adapter directory to a model that is ready to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora import io
from molora.attach import Mixture, load
from molora.config.base import unknown_name
from molora.errors import CheckpointError, ConfigError

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A base model in evaluation mode, its tokenizer, and the mixture that is on it."""

    model: Any
    """The transformers model."""
    tokenizer: Any
    """The base model's tokenizer."""
    mixture: Mixture


def load_for_generation(adapter: Path, *, model: str | None = None, dtype: str = "auto") -> Loaded:
    """Load the base model of a saved mixture, and the mixture onto it.

    An adapter is data from somebody else: the base model that it names is loaded only where that
    name is a directory here. Code that comes with a model is never run.

    Args:
        adapter: directory with a saved mixture.
        model: the base model, a directory or a name on the hub; the adapter's own if not given.
        dtype: ``auto`` (as the base is stored), float32, bfloat16 or float16.

    Raises:
        CheckpointError: a damaged adapter, a base model that cannot be loaded or is another one
            than the mixture was trained on.
        ConfigError: an unknown dtype.
    """
    if dtype not in _DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, list(_DTYPES)))
    name = base_name(adapter, model)
    base, tokenizer = _load_base(name, dtype)
    base.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return Loaded(base, tokenizer, load(base, adapter))


def base_name(adapter: Path, model: str | None) -> str:
    """What to load as the base model: `model`, or what the mixture names if it is a directory here.

    Raises:
        CheckpointError: a damaged mixture, or one whose base has to be fetched.
    """
    trained_on = io.read_manifest(adapter).base.name
    if model is not None or Path(trained_on).is_dir():
        return model or trained_on
    raise CheckpointError(
        f"the mixture in {adapter} was trained on {trained_on!r}, which is no directory here, and "
        "nothing that an adapter names is fetched unasked. Say where the base model is: "
        "--model with a directory, or with that name if you trust it."
    )


def _load_base(name: str, dtype: str) -> tuple[Any, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else f"{reason[:297]}…"
        raise CheckpointError(
            f"the base model {name!r} cannot be loaded: {reason} Give a directory or a hub name of "
            "a causal language model with its tokenizer."
        ) from error
    return model, tokenizer

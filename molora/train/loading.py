"""Base models and tokenizers, from a directory or from the Hugging Face hub and its cache."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from molora.config.run import ModelConfig
from molora.errors import ConfigError
from molora.train.deepspeed_config import is_partitioned
from molora.train.zero_init import divided

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# False, not the default: by default transformers asks at the terminal whether to run a model's code
_NO_FOREIGN_CODE = {"trust_remote_code": False}


def load_model(config: ModelConfig, *, engine: Mapping[str, Any] | None = None) -> nn.Module:
    """The base model with its weights, in evaluation mode.

    Args:
        config: which model.
        engine: DeepSpeed's configuration; if it is ZeRO-3's, each process is left with its part of
            the weights.

    Raises:
        ConfigError: no such model, damaged files, or a model that is no causal language model.
    """
    dtype = _dtype(config) if is_partitioned(engine) else torch.float32
    with _reported(config), divided(engine, dtype):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            config.name,
            revision=config.revision,
            dtype=config.dtype,
            attn_implementation=config.attention,
            **_NO_FOREIGN_CODE,
        )
    return model.eval()


def load_skeleton(config: ModelConfig) -> nn.Module:
    """The base model on the meta device: its modules and shapes, without weights or memory.

    Raises:
        ConfigError: as `load_model`.
    """
    with _reported(config):
        settings = AutoConfig.from_pretrained(
            config.name, revision=config.revision, **_NO_FOREIGN_CODE
        )
        options: dict[str, Any] = {"attn_implementation": config.attention}
        if config.dtype != "auto":
            options["dtype"] = getattr(torch, config.dtype)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                settings, **options, **_NO_FOREIGN_CODE
            )
    return model.eval()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        ConfigError: as `load_model`.
    """
    with _reported(config):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            config.name, revision=config.revision, **_NO_FOREIGN_CODE
        )
    return tokenizer


def _dtype(config: ModelConfig) -> torch.dtype:
    if config.dtype != "auto":
        named: torch.dtype = getattr(torch, config.dtype)
        return named
    return stored_dtype(config)


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """In which the base's files have it.

    Raises:
        ConfigError: as `load_model`.
    """
    with _reported(config):
        settings = AutoConfig.from_pretrained(
            config.name, revision=config.revision, **_NO_FOREIGN_CODE
        )
    return settings.dtype or torch.float32


@contextmanager
def _reported(config: ModelConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        revision = f" at revision {config.revision!r}" if config.revision else ""
        reason = " ".join(str(error).split())
        if not Path(config.name).exists() and not _HUB_NAME.fullmatch(config.name):
            reason = "there is no such directory."
        reason = reason if len(reason) <= 300 else f"{reason[:297]}…"
        raise ConfigError(
            f"model.name={config.name!r}{revision} cannot be loaded: {reason} Give the directory "
            "of a Hugging Face causal language model, or the name of one on the hub that is in "
            "the cache or can be reached from here."
        ) from error

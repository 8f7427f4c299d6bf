"""What identifies a base model: its configuration, and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import CheckpointError
from molora.io import BaseFingerprint

VOLATILE = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "architectures",
        "use_cache",
        "quantization_config",
        # trainers set these from the tokenizer and from their own arguments
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "output_router_logits",
        "router_aux_loss_coef",
    }
)
"""Configuration keys that differ between two loads of the same model, or before and after
training it."""
MAX_TENSORS = 24
SAMPLES = 64


def fingerprint(model: nn.Module, *, exclude: Iterable[str] = ()) -> BaseFingerprint:
    """Hash the base below a mixture; parameters named in `exclude`, the trained ones, are left out.

    Values are rounded to bfloat16, so that loading in another dtype or quantising the linears gives
    the same hash.
    """
    config = getattr(model, "config", None)
    settings: dict[str, Any] = (
        config.to_dict() if config is not None else {"class": type(model).__name__}
    )
    stable = {key: value for key, value in settings.items() if key not in VOLATILE}
    text = json.dumps(stable, sort_keys=True, default=str)
    return BaseFingerprint(
        name=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        weights_sha256={
            name: _sample_hash(tensor) for name, tensor in _sampled(model, frozenset(exclude))
        },
    )


def check_same_base(
    model: nn.Module, expected: BaseFingerprint, *, exclude: Iterable[str] = ()
) -> None:
    """Raise CheckpointError unless `model` is the base that was fingerprinted, as far as the
    samples tell."""
    found = fingerprint(model, exclude=exclude)
    if found.config_sha256 != expected.config_sha256:
        raise CheckpointError(
            f"the mixture was trained on {expected.name!r}; this model's configuration "
            f"({found.name!r}) is another. "
            "Load the base model that the mixture was trained on."
        )
    common = [name for name in expected.weights_sha256 if name in found.weights_sha256]
    if expected.weights_sha256 and not common:
        raise CheckpointError(
            f"this model shares no parameter with the base {expected.name!r} of the mixture."
        )
    for name in common:
        if found.weights_sha256[name] != expected.weights_sha256[name]:
            raise CheckpointError(
                f"the mixture was trained on {expected.name!r}, whose {name} has other values than "
                "this model's "
                f"({found.name!r}). Load the base model that the mixture was trained on."
            )


def _sampled(model: nn.Module, exclude: frozenset[str]) -> list[tuple[str, Tensor]]:
    """Up to MAX_TENSORS float parameters of the base, evenly spread over their sorted names."""
    named = sorted(
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not parameter.is_meta and name not in exclude
    )
    step = max(1, -(-len(named) // MAX_TENSORS))
    return [(name, parameter.detach()) for name, parameter in named[::step]]


def _sample_hash(tensor: Tensor) -> str:
    flat = tensor.reshape(-1)
    index = torch.linspace(
        0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64
    ).long()
    values = (
        flat[index.to(flat.device)].to("cpu", torch.float32).to(torch.bfloat16).view(torch.int16)
    )
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:32]

"""What identifies a base model: its configuration, and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
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
        "quantization_config",
        # what a caller wants to get back
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        # trainers set these from the tokenizer and from their own arguments
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "router_aux_loss_coef",
        # a classifier's forward sets it from its labels
        "problem_type",
        # names of classes; their number shows in the head's shape
        "id2label",
        "label2id",
    }
)
"""Keys, at any depth, that differ between loads of one model, or before and after training it."""
MAX_TENSORS = 24
SAMPLES = 64
ROUNDINGS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""What is hashed: float32 and a half-precision copy of it agree in the rounding of the copy."""

Gather = Callable[[list[Tensor]], AbstractContextManager[Any]]
"""Parameters → a context inside which those that an engine has partitioned are whole."""


def fingerprint(
    model: nn.Module, *, exclude: Iterable[str] = (), gather: Gather | None = None
) -> BaseFingerprint:
    """Hash the base below a mixture; parameters named in `exclude`, the trained ones, are left out.

    Values are rounded before they are hashed, so that the same weights loaded in another dtype give
    the same hash. Without `gather`, partitioned parameters are left out; with it, this is
    collective, one parameter at a time.
    """
    left_out = frozenset(exclude)
    named = sorted(
        (name, parameter)
        for name, parameter in model.named_parameters()
        if _is_comparable(parameter, gather) and name not in left_out
    )
    step = max(1, -(-len(named) // MAX_TENSORS))
    return BaseFingerprint(
        name=_name(model),
        config_sha256=_settings(model),
        weights_sha256={name: _sample_hashes(p, gather) for name, p in named[::step]},
    )


def check_same_base(
    model: nn.Module, expected: BaseFingerprint, *, gather: Gather | None = None
) -> None:
    """Raise CheckpointError unless `model` is, as far as samples tell, the fingerprinted base.

    Only settings that both configurations have are compared, since versions of transformers add
    some; of the weights, those that were not quantised since, nor partitioned without `gather`.
    """
    remedy = "Load the base model that the mixture was trained on."
    settings = _settings(model)
    other = [
        key for key, digest in expected.config_sha256.items() if settings.get(key, digest) != digest
    ]
    if other:
        raise CheckpointError(
            f"the mixture was trained on {expected.name!r}; this model ({_name(model)!r}) has "
            f"another {', '.join(other[:5])}. {remedy}"
        )
    parameters = dict(model.named_parameters())
    compared = 0
    for name, hashes in expected.weights_sha256.items():
        if name not in parameters:
            raise CheckpointError(
                f"the mixture was trained on {expected.name!r}, which has a parameter {name!r} "
                f"that this model ({_name(model)!r}) lacks. {remedy}"
            )
        if not _is_comparable(parameters[name], gather):
            continue
        compared += 1
        if not hashes.items() & _sample_hashes(parameters[name], gather).items():
            raise CheckpointError(
                f"the mixture was trained on {expected.name!r}, whose {name} has other values than "
                f"this model's ({_name(model)!r}). {remedy}"
            )
    if expected.weights_sha256 and not compared and not _is_meta(model):
        raise CheckpointError(
            f"no weight of this model ({_name(model)!r}) can be compared with the base "
            f"{expected.name!r} of the mixture: all are quantised or partitioned. {remedy}"
        )


def _name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def _settings(model: nn.Module) -> dict[str, str]:
    """Setting → hash of its value."""
    config = getattr(model, "config", None)
    settings = {"class": type(model).__name__} if config is None else _stable(config.to_dict())
    return {
        key: _digest(json.dumps(value, sort_keys=True, default=str).encode())
        for key, value in settings.items()
    }


def _stable(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {str(key): _stable(item) for key, item in value.items() if key not in VOLATILE}


def _is_comparable(parameter: Tensor, gather: Gather | None) -> bool:
    """Whether its values can be had as they are: not on meta, quantised, or divided for good."""
    # DeepSpeed leaves a partitioned parameter empty, and writes down its size
    divided = 0 if gather is None else getattr(parameter, "ds_numel", 0)
    return (
        type(parameter) in (nn.Parameter, Tensor)
        and parameter.is_floating_point()
        and (parameter.numel() > 0 or divided > 0)
        and not parameter.is_meta
    )


def _is_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def _sample_hashes(tensor: Tensor, gather: Gather | None) -> dict[str, str]:
    """Rounding → hash of up to SAMPLES values, evenly spread."""
    with nullcontext() if gather is None else gather([tensor]):
        flat = tensor.detach().reshape(-1)
        index = torch.linspace(
            0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64
        ).long()
        values = flat[index.to(flat.device)].to("cpu", torch.float32)
    return {
        name: _digest(values.to(dtype).view(torch.int16).numpy().tobytes())
        for name, dtype in ROUNDINGS.items()
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]

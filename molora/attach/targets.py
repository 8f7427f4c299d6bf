"""Patterns → linear modules of a model, with an error for every pattern that matches nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from torch import nn

from molora.attach.families import LINEAR_TYPES, ROUTER_NAMES, is_attention, layer_of
from molora.errors import AttachError


@dataclass(frozen=True)
class Match:
    """A pattern and the paths of the linears that it matched, in model order."""

    pattern: str
    paths: tuple[str, ...]


def match_targets(model: nn.Module, patterns: Iterable[str]) -> tuple[Match, ...]:
    """Match every pattern.

    `attention` and `ffn` are the linears of a layer with and without "attn" or "attention" in their
    path, `all` is both; heads, embeddings and a base model's own routers belong to neither. `re:…`
    is a regular expression for the whole path. Anything else is a suffix at a component boundary,
    such as `q_proj` or `mlp.down_proj`.

    Raises:
        AttachError: a pattern that matches no linear, or that is not a regular expression.
    """
    linears = [
        name for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES) and name
    ]
    return tuple(_match(model, pattern, linears) for pattern in patterns)


def match_paths(model: nn.Module, paths: Iterable[str]) -> tuple[Match, ...]:
    """Each path as a linear of exactly that name.

    Raises:
        AttachError: a path that the model has not, or not as a linear.
    """
    modules = dict(model.named_modules())
    for path in paths:
        if isinstance(modules.get(path), LINEAR_TYPES):
            continue
        linears = [name for name, m in modules.items() if isinstance(m, LINEAR_TYPES) and name]
        if path in modules:
            raise AttachError(
                f"an expert adapts {path}, which is a {type(modules[path]).__name__} here; "
                f"experts go on {', '.join(kind.__name__ for kind in LINEAR_TYPES)} only."
            )
        close = difflib.get_close_matches(path, linears, n=3, cutoff=0.4)
        raise AttachError(
            f"an expert adapts {path}, which this model has not. "
            f"Close names: {', '.join(close) or 'none'}. It was trained on another base, or on one "
            "with or without a head: load the base with the class that the adapter names."
        )
    return tuple(Match(path, (path,)) for path in paths)


def untouched_experts(model: nn.Module, adapted: Container[str] = ()) -> tuple[str, ...]:
    """Fused expert parameters (experts, out, in) of the base, which carry no LoRA experts; those
    `adapted` by imported ones aside."""
    return tuple(
        f"{name} {tuple(parameter.shape)}"
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
        and "lora_" not in name
        and name not in adapted
        and layer_of(model, name) is not None
    )


def _match(model: nn.Module, pattern: str, linears: list[str]) -> Match:
    if pattern in ("attention", "ffn", "all"):
        inside = [
            path
            for path in linears
            if layer_of(model, path) is not None and path.rpartition(".")[2] not in ROUTER_NAMES
        ]
        paths = [
            path
            for path in inside
            if pattern == "all" or is_attention(path) == (pattern == "attention")
        ]
    elif pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise AttachError(
                f"targets={pattern!r} is not a regular expression: {error}."
            ) from None
        paths = [path for path in linears if expression.fullmatch(path)]
    else:
        paths = [path for path in linears if path == pattern or path.endswith(f".{pattern}")]
    if not paths:
        raise AttachError(_nothing_matched(model, pattern, linears))
    return Match(pattern, tuple(paths))


def _nothing_matched(model: nn.Module, pattern: str, linears: list[str]) -> str:
    names = sorted({path.rpartition(".")[2] for path in linears})
    close = difflib.get_close_matches(pattern.rpartition(".")[2], names, n=3, cutoff=0.4)
    message = f"targets={pattern!r} matches no linear module. "
    message += (
        f"Close names: {', '.join(close)}."
        if close
        else f"Linear modules: {', '.join(names) or 'none'}."
    )
    other = next(
        (
            f"{n} ({type(m).__name__})"
            for n, m in model.named_modules()
            if n.endswith(f".{pattern}")
        ),
        None,
    )
    if other is not None:
        supported = ", ".join(kind.__name__ for kind in LINEAR_TYPES)
        message += (
            f" {other} has that name, but experts go on {supported} only, quantised ones included."
        )
    fused = untouched_experts(model)
    if fused:
        message += (
            " This base model is itself a mixture of experts: its experts are fused 3-D "
            f"parameters ({fused[0]}, {len(fused)} in all), which molora leaves untouched. Target "
            "its attention linears instead."
        )
    return message

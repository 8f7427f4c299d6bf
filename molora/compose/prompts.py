"""Routers that start from prompts: what the base makes of texts that say what an expert is for.

Source: mergekit-moe 0.1.5, whose rows of gates are the base's hidden states of prompts; its file is
read by `molora.io.formats.mergekit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from molora.attach.families import layer_of
from molora.errors import AttachError, ConfigError
from molora.io.formats.mergekit import PromptSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mode = Literal["hidden", "hidden_avg", "cheap_embed"]
SIMILAR = 5.0
"""A condition number above which rows hardly tell experts apart, as mergekit warns."""


@torch.no_grad()
def prompt_vectors(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    *,
    mode: Mode = "hidden",
) -> dict[str, dict[str, Tensor]]:
    """Expert → layer → (hidden,) vector of norm 1: the mean over its positive prompts of what goes
    into the layer, minus that over its negative ones.

    For routers of `scope="layer"`, as `vectors`: they read just that.

    Args:
        model: the base, without a mixture or with one that is disabled.
        tokenizer: the base's.
        prompts: expert → positive and negative prompts; at least one positive.
        mode: "hidden", of the last token; "hidden_avg", the mean over tokens; "cheap_embed", the
            mean of the tokens' embeddings, the same for all layers.

    Raises:
        ConfigError: an expert without positive prompts, or an empty prompt.
        AttachError: a model without layers that molora knows.
    """
    for name, (positive, negative) in prompts.items():
        if not positive or not all(text.strip() for text in (*positive, *negative)):
            raise ConfigError(f"prompts of {name!r}: give positive ones, and none that is empty.")
    layers = _layers(model)
    means: dict[str, list[Tensor]] = {}
    for name, (positive, negative) in prompts.items():
        rows_LH = torch.stack([_states(model, tokenizer, text, mode) for text in positive]).mean(0)
        if negative:
            minus = torch.stack([_states(model, tokenizer, text, mode) for text in negative])
            rows_LH = rows_LH - minus.mean(0)
        means[name] = list(nn.functional.normalize(rows_LH, dim=-1))
    return {
        name: {path: rows[min(number, len(rows) - 1)] for number, path in enumerate(layers)}
        for name, rows in means.items()
    }


def settings_prompts(
    settings: PromptSettings, names: Sequence[str]
) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """The prompts of a mergekit-moe file for experts in the same order.

    Raises:
        ConfigError: another number of experts.
    """
    if len(settings.experts) != len(names):
        raise ConfigError(
            f"the file has prompts for {len(settings.experts)} experts, and there are {len(names)}."
        )
    return {
        name: (expert.positive_prompts, expert.negative_prompts)
        for name, expert in zip(names, settings.experts, strict=True)
    }


def condition(vectors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Layer → condition number of the experts' rows; above `SIMILAR` they hardly differ."""
    layers = next(iter(vectors.values())).keys()
    return {
        layer: float(torch.linalg.cond(torch.stack([rows[layer] for rows in vectors.values()])))
        for layer in layers
    }


def _layers(model: nn.Module) -> list[str]:
    found = {
        layer.path: layer.index
        for path, _ in model.named_modules()
        if (layer := layer_of(model, path)) is not None
    }
    if not found:
        raise AttachError(
            f"{type(model).__name__} has no list of layers, so that routers of layers cannot start "
            "from prompts."
        )
    return sorted(found, key=lambda path: found[path])


def _states(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, mode: Mode) -> Tensor:
    """(L, hidden): what goes into each layer; (1, hidden) of embeddings."""
    ids_1S = tokenizer(text, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
    if mode == "cheap_embed":
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        return embeddings(ids_1S)[0].float().mean(dim=0)[None]
    was_training = model.training
    model.eval()
    try:
        output = model(input_ids=ids_1S, output_hidden_states=True, use_cache=False)
    finally:
        model.train(was_training)
    # the last is what comes out of the last layer
    states_LSH = torch.cat(list(output.hidden_states[:-1])).float()
    return states_LSH[:, -1] if mode == "hidden" else states_LSH.mean(dim=1)

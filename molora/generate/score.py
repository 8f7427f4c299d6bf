"""How likely a model finds given answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.data import IGNORED, Encoded, Row, RowEncoder, padding_id
from molora.errors import DataError
from molora.generate.batches import by_length, evaluating, left_padded, right_padded

# Scores are of whole answers: nothing is cut, the model's own length is the limit.
_UNCUT = 2**31


@dataclass(frozen=True)
class Branches:
    """The choices of one row: a prefix that all share, and how each goes on."""

    prefix: list[int]
    """Tokens that no choice changes, but for the last of them: it predicts the first that differs,
    and so it begins every suffix."""
    suffixes: list[list[int]]
    """Tokens up to the last but one of the choice, which predicts the last one."""
    targets: list[list[int]]
    """What each token of a suffix predicts: the next token if it belongs to the choice, or -100."""


def score_choices(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    chat_template: Literal["auto", "none"] = "auto",
    batch_size: int = 16,
) -> list[tuple[float, ...]]:
    """Per row the log-likelihood of each of its choices, in nats, summed over the choice's tokens.

    Σ_t log p(token_t | prompt, tokens before t) over the tokens of the choice and its stop token,
    rendered as in training. What the choices have in common is run once, with a KV cache that is
    then expanded over them; equal to full forwards up to rounding.

    Args:
        rows: rows with `choices`, and prompt and completion or messages; the completion, or the
            last message, is replaced by each choice.
        batch_size: rows per forward.

    Raises:
        DataError: a row without choices or without a prompt.
    """
    encoder = RowEncoder(tokenizer, max_length=_UNCUT, chat_template=chat_template)
    branches = [_branches(row, encoder) for row in rows]
    scores: list[tuple[float, ...]] = [()] * len(rows)
    with evaluating(model):
        for chunk in by_length([b.prefix for b in branches], batch_size):
            batch = [branches[i] for i in chunk]
            flat = _log_likelihoods(model, batch, padding_id(tokenizer)).tolist()
            for i, branch in zip(chunk, batch, strict=True):
                count = len(branch.suffixes)
                scores[i], flat = tuple(flat[:count]), flat[count:]
    return scores


def completion_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    chat_template: Literal["auto", "none"] = "auto",
    batch_size: int = 16,
) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and the number, of all supervised tokens of the rows.

    Rendered as in training and not cut; the quotient is the loss per token, and pairs of several
    calls may be added up first.
    """
    encoder = RowEncoder(tokenizer, max_length=_UNCUT, chat_template=chat_template)
    examples = [example for row in rows for example in encoder(row)]
    inputs, targets = [*map(_inputs, examples)], [*map(_targets, examples)]
    pad, device = padding_id(tokenizer), model.device
    nll, tokens = 0.0, 0
    with evaluating(model):
        for chunk in by_length(inputs, batch_size):
            ids_BS, mask_BS = right_padded([inputs[i] for i in chunk], pad, device=device)
            targets_BS, _ = right_padded([targets[i] for i in chunk], IGNORED, device=device)
            scores_T, _ = _token_scores(model, ids_BS, mask_BS, targets_BS)
            nll -= scores_T.double().sum().item()
            tokens += scores_T.numel()
    return nll, tokens


def _branches(row: Row, encoder: RowEncoder) -> Branches:
    if row.choices is None:
        raise DataError(f"{row.where}: there are no `choices` to score. Give the row some.")
    encoded = [encoder(_with_answer(row, choice))[-1] for choice in row.choices]
    starts = [_answer_start(example) for example in encoded]
    if min(starts) == 0:
        raise DataError(f"{row.where}: nothing stands before the choices. Give the row a prompt.")
    shared = min(_common_prefix([e.input_ids for e in encoded]), *starts)
    cut = max(shared - 1, 0)
    return Branches(
        prefix=encoded[0].input_ids[:cut],
        suffixes=[_inputs(example)[cut:] for example in encoded],
        # earlier answers of a conversation are supervised in training, and no part of the choice
        targets=[
            [IGNORED] * (start - 1 - cut) + _targets(example)[start - 1 :]
            for example, start in zip(encoded, starts, strict=True)
        ],
    )


def _with_answer(row: Row, answer: str) -> Row:
    if row.messages is not None:
        last = {**row.messages[-1], "content": answer}
        return replace(row, messages=[*row.messages[:-1], last])
    if row.prompt is None:
        raise DataError(f"{row.where}: `choices` need a `prompt` or `messages`, not `text`.")
    return replace(row, completion=answer)


def _answer_start(example: Encoded) -> int:
    """Where the last answer starts."""
    supervised = [False, *(label != IGNORED for label in example.labels)]
    return max(i for i, (before, here) in enumerate(pairwise(supervised)) if here and not before)


def _inputs(example: Encoded) -> list[int]:
    """The tokens that predict something or stand before one that does."""
    return example.input_ids[: len(_targets(example))]


def _targets(example: Encoded) -> list[int]:
    """What each of the inputs predicts: the token after it where that is supervised, or -100."""
    end = max(i for i, label in enumerate(example.labels) if label != IGNORED)
    return example.labels[1 : end + 1]


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    tokens = zip(*rows, strict=False)
    shortest = min(map(len, rows))
    return next((i for i, column in enumerate(tokens) if len(set(column)) > 1), shortest)


def _log_likelihoods(model: Any, batch: Sequence[Branches], pad: int) -> Tensor:
    """(choices of all rows,) log-likelihoods."""
    prefix_BP, mask_BP = left_padded([b.prefix for b in batch], pad, device=model.device)
    owner_C = torch.tensor(
        [row for row, b in enumerate(batch) for _ in b.suffixes], device=model.device
    )
    suffixes = [suffix for b in batch for suffix in b.suffixes]
    targets = [targets for b in batch for targets in b.targets]
    suffix_CS, mask_CS = right_padded(suffixes, pad, device=model.device)
    targets_CS, _ = right_padded(targets, IGNORED, device=model.device)
    cache = None
    if prefix_BP.shape[1]:
        out = _forward(model, prefix_BP, mask_BP, None, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        cache.batch_select_indices(owner_C)
    mask_CT = torch.cat([mask_BP[owner_C], mask_CS], dim=1)
    scores_T, choice_T = _token_scores(model, suffix_CS, mask_CT, targets_CS, cache=cache)
    totals_C = torch.zeros(len(suffixes), dtype=torch.float64, device=model.device)
    return totals_C.index_add_(0, choice_T, scores_T.double())


def _token_scores(
    model: Any, ids_BS: Tensor, mask_BT: Tensor, targets_BS: Tensor, *, cache: Any = None
) -> tuple[Tensor, Tensor]:
    """log p of every target in float32, and the row that it is in."""
    logits_BSV = _forward(model, ids_BS, mask_BT, cache).logits
    row_T, position_T = torch.nonzero(targets_BS != IGNORED, as_tuple=True)
    # only where there is a target: float32 logits of a whole batch are the largest tensor there is
    logits_TV = logits_BSV[row_T, position_T].float()
    targets_T = targets_BS[row_T, position_T]
    return -torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none"), row_T


def _forward(
    model: Any,
    ids_BS: Tensor,
    mask_BT: Tensor,
    cache: Any,
    *,
    use_cache: bool = False,
    logits_to_keep: int = 0,
) -> Any:
    """A forward whose positions count no padding, whatever side it is on."""
    known = inspect.signature(type(model).forward).parameters
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp_min(0)
    arguments = {
        "position_ids": positions_BT[:, -ids_BS.shape[1] :],
        "logits_to_keep": logits_to_keep,
    }
    return model(
        input_ids=ids_BS,
        attention_mask=mask_BT,
        past_key_values=cache,
        use_cache=use_cache or cache is not None,
        **{name: value for name, value in arguments.items() if name in known},
    )

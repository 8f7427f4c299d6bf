"""Preferences: two answers to one prompt, of which one is better, as tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.config.data import DataConfig
from molora.data.mask import IGNORED, RowEncoder
from molora.data.rows import Row, checked_messages, checked_text, refuse_tools, shown
from molora.data.tokenized import Form, Tokenized, as_datasets
from molora.errors import DataError

_ANSWERS = ("chosen", "rejected")


def to_compare(present: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The body of a preference, in one of three forms.

    ============================ ===================================================
    ``prompt``                   ``chosen`` and ``rejected``
    ============================ ===================================================
    a string                     strings
    messages up to the answers   lists of one message of the assistant
    absent, or a message's text  conversations that differ in their last message alone
    ============================ ===================================================

    Raises:
        DataError: naming ``where``, the rule and the value, for a row of none of them.
    """
    refuse_tools(present, where)
    if not present.keys() >= set(_ANSWERS):
        raise DataError(
            f"{where}: a preference needs `chosen` and `rejected`, and a `prompt` where these are "
            f"not whole conversations; its columns: {', '.join(present) or 'none'}."
        )
    prompt = present.get("prompt")
    texts = [isinstance(present[name], str) for name in _ANSWERS]
    if any(texts):
        if not all(texts) or not isinstance(prompt, str):
            raise DataError(
                f"{where}: where one of them is a string, `prompt`, `chosen` and `rejected` must "
                "all be, but they are "
                + ", ".join(f"`{n}`: {shown(present.get(n))}" for n in ("prompt", *_ANSWERS))
                + "."
            )
        answers = {name: checked_text(present, name, where) for name in _ANSWERS}
        return {
            "prompt": checked_text(present, "prompt", where),
            **{n: {"role": "assistant", "content": text} for n, text in answers.items()},
        }
    return _conversations(present, prompt, where)


def _conversations(present: Mapping[str, Any], prompt: Any, where: str) -> dict[str, Any]:
    before = prompt if isinstance(prompt, list) else []
    if prompt is not None and not isinstance(prompt, str | list):
        raise DataError(f"{where}: `prompt` must be a string or messages, not {shown(prompt)}.")
    whole = {}
    for name in _ANSWERS:
        value = present[name]
        if not isinstance(value, list):
            raise DataError(f"{where}: `{name}` must be a string or messages, not {shown(value)}.")
        whole[name] = checked_messages([*before, *value], f"{where}, `{name}`")
        if whole[name][-1]["role"] != "assistant":
            raise DataError(
                f"{where}: `{name}` must end with a message of the assistant, not with "
                f"{shown(whole[name][-1])}."
            )
    shared, last = whole["chosen"][:-1], {name: messages[-1] for name, messages in whole.items()}
    if whole["rejected"][:-1] != shared:
        raise DataError(
            f"{where}: `chosen` and `rejected` must differ in their last message alone, or they "
            "answer different conversations."
        )
    if shared[-1]["role"] == "assistant":
        raise DataError(f"{where}: an answer must not follow another of the assistant's own.")
    if isinstance(prompt, str) and prompt not in [message["content"] for message in shared]:
        raise DataError(
            f"{where}: `prompt` ({shown(prompt)}) is no message of the conversations in `chosen` "
            "and `rejected`. Leave it out, or put it into them."
        )
    return {"messages": shared, **last}


@dataclass(frozen=True)
class Pair:
    """One prompt and two answers with their stop tokens, cut so that none exceeds ``max_length``.

    Attributes:
        length: tokens of the prompt with the longer answer, before they were cut.
        max_length: of the prompt with either answer.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    length: int
    max_length: int

    @property
    def columns(self) -> tuple[list[int], ...]:
        """In the order of `PairEncoder.COLUMNS`."""
        return self.prompt_ids, self.chosen_ids, self.rejected_ids

    @property
    def tokens(self) -> int:
        """Number of tokens of both sequences."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def truncated(self) -> bool:
        """Whether ``max_length`` cut something off."""
        return self.length > self.max_length

    @property
    def supervised(self) -> int:
        """Tokens of the answers; 0 if nothing can be preferred, since they do not differ."""
        if self.chosen_ids == self.rejected_ids or not (self.chosen_ids and self.rejected_ids):
            return 0
        return len(self.chosen_ids) + len(self.rejected_ids)


class PairEncoder:
    """Row → its pair: the tokens that the model gets, and those that it must write in each case.

    Both are what supervised training has, see `RowEncoder`; earlier answers of a conversation are
    part of the prompt.

    Args:
        tokenizer: a Hugging Face tokenizer with an eos token.
        max_length: tokens of prompt and answer that are kept; answers are cut at the end.
        chat_template: as in `DataConfig`.
    """

    COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 1024, chat_template: Any
    ) -> None:
        # whole first: an answer ends where its stop token is
        self._encoder = RowEncoder(tokenizer, max_length=sys.maxsize, chat_template=chat_template)
        self._max_length = max_length

    def __call__(self, row: Row) -> list[Pair]:
        """The pair of a preference's row.

        Raises:
            DataError: as `RowEncoder`, and for a row that is no preference.
        """
        asked = row.messages if row.prompt is None else row.prompt
        if asked is None or row.chosen is None or row.rejected is None:
            raise DataError(f"{row.where}: a preference has a prompt, `chosen` and `rejected`.")
        prompt_ids = self._encoder.prompt(asked, row.where)
        chosen, rejected = (self._answer(row, answer) for answer in (row.chosen, row.rejected))
        room = max(0, self._max_length - len(prompt_ids))
        return [
            Pair(
                prompt_ids,
                chosen[:room],
                rejected[:room],
                length=len(prompt_ids) + max(len(chosen), len(rejected)),
                max_length=self._max_length,
            )
        ]

    def _answer(self, row: Row, message: dict[str, Any]) -> list[int]:
        if row.prompt is not None:
            whole = Row(where=row.where, prompt=row.prompt, completion=message["content"])
        else:
            whole = Row(where=row.where, messages=[*(row.messages or ()), message])
        # of a conversation the last answer: what it answers lies unsupervised before it
        example = self._encoder(whole)[-1]
        stop = max(i for i, label in enumerate(example.labels) if label != IGNORED) + 1
        start = stop
        while start > 0 and example.labels[start - 1] != IGNORED:
            start -= 1
        return example.input_ids[start:stop]


def tokenize_pairs(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
) -> Tokenized:
    """As `molora.data.tokenize`, of preferences.

    In place of ``input_ids`` and ``labels`` the datasets have ``prompt_ids``, ``chosen_ids`` and
    ``rejected_ids``, as TRL's DPOTrainer names them.
    """
    encoder = PairEncoder(
        tokenizer, max_length=config.max_length, chat_template=config.chat_template
    )
    return as_datasets(config, Form(to_compare, encoder, encoder.COLUMNS), seed=seed)

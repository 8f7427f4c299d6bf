"""Rows as tokens, with labels on what the model must write and -100 elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from molora.data.rows import Row
from molora.data.template import ChatTemplate, Rendered, chat_template
from molora.errors import DataError

IGNORED = -100
"""The label of tokens without loss, as torch and transformers have it."""


@dataclass(frozen=True)
class Encoded:
    """One training example. ``labels[t]`` is ``input_ids[t]`` or -100; both have equal length."""

    input_ids: list[int]
    labels: list[int]
    length: int
    """Number of tokens before ``max_length`` cut some off."""

    @property
    def columns(self) -> tuple[list[int], ...]:
        """In the order of `RowEncoder.COLUMNS`."""
        return self.input_ids, self.labels

    @property
    def tokens(self) -> int:
        """Number of tokens that are left."""
        return len(self.input_ids)

    @property
    def truncated(self) -> bool:
        """Whether ``max_length`` cut it; then the last answer may lack its stop token."""
        return self.length > len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Number of tokens with a loss."""
        return sum(label != IGNORED for label in self.labels)


class RowEncoder:
    """Row → the examples it gives: tokens, and labels on the answers and their stop tokens.

    ============ ================================ ==========================================
    row          with a chat template             without, or ``chat_template: none``
    ============ ================================ ==========================================
    messages     every assistant turn + its stop  an error
    prompt       as a user's and an assistant's   prompt and completion joined as they
    completion   turn: an instruct model has      stand, completion + eos
                 only ever seen prompts so
    text         all of it + eos                  all of it + eos
    ============ ================================ ==========================================

    The column on the right names what is supervised after the comma. Labels come from positions,
    never from token ids: an eos inside an answer is supervised, also where it is the padding token.
    Without a template a sequence begins with bos where the tokenizer puts one.

    Args:
        tokenizer: a Hugging Face tokenizer with an eos token.
        max_length: examples are cut to so many tokens, at the end.
        chat_template: ``auto`` uses the tokenizer's template if it has one.
    """

    COLUMNS = ("input_ids", "labels")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        chat_template: Literal["auto", "none"] = "auto",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no eos token, so no text can end. Set tokenizer.eos_token."
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._template = _template(tokenizer, chat_template)

    def __call__(self, row: Row) -> list[Encoded]:
        """One example, or one per answer where the template writes earlier turns differently.

        Raises:
            DataError: naming the row, when nothing in it would be supervised or an answer would
                not end with a stop token. What ``max_length`` cuts is not an error: ``truncated``
                is set, and ``supervised`` may be 0.
        """
        if row.text is not None:
            return [self._plain("", row.text, row.where)]
        if row.prompt is not None and row.completion is not None:
            if self._template is None:
                return [self._plain(row.prompt, row.completion, row.where)]
            user = {"role": "user", "content": row.prompt}
            return self._chat([user, {"role": "assistant", "content": row.completion}], row.where)
        if row.messages is None:
            raise DataError(f"{row.where}: a row has messages, prompt with completion, or text.")
        return self._chat(row.messages, row.where)

    @property
    def stop_id(self) -> int:
        """The token that ends every answer: the template's end of turn, or else eos."""
        template = self._template
        return self._tokenizer.eos_token_id if template is None else template.stop_id

    def prompt(self, asked: str | Sequence[Mapping[str, Any]], where: str = "prompt") -> list[int]:
        """The tokens after which the model writes, exactly those before an answer in training.

        Args:
            asked: a prompt, or the messages up to the turn that is to be written.
            where: what an error calls it.

        Raises:
            DataError: messages without a chat template, or ones that the template refuses.
        """
        if isinstance(asked, str) and self._template is None:
            ids, _ = _tokens(asked, [], self._tokenizer, where)
            return [*self._beginning(ids), *ids]
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        rendered = self._chat_template(where).prompt([dict(m) for m in messages], where)
        cuts = [position for answer in rendered.answers for position in answer]
        return _tokens(rendered.text, cuts, self._tokenizer, where)[0]

    def _chat_template(self, where: str) -> ChatTemplate:
        if self._template is None:
            raise DataError(
                f"{where}: `messages` need a chat template, which this tokenizer lacks or "
                "chat_template: none turned off. Use prompt and completion, or another tokenizer."
            )
        return self._template

    def _chat(self, messages: list[dict[str, Any]], where: str) -> list[Encoded]:
        template = self._chat_template(where)
        return [self._answers(part, template, where) for part in template.render(messages, where)]

    def _answers(self, part: Rendered, template: ChatTemplate, where: str) -> Encoded:
        cuts = [position for answer in part.answers for position in answer]
        ids, places = _tokens(part.text, cuts, self._tokenizer, where)
        labels = [IGNORED] * len(ids)
        for start, stop in zip(places[::2], places[1::2], strict=True):
            labels[start:stop] = ids[start:stop]
            if ids[stop - 1] != template.stop_id:
                raise DataError(
                    f"{where}: the last token of an answer is {ids[stop - 1]}, not the stop token "
                    f"{template.stop!r} ({template.stop_id}): the model would not learn to stop."
                )
        return self._cut(ids, labels, where)

    def _plain(self, prompt: str, completion: str, where: str) -> Encoded:
        tokenizer = self._tokenizer
        ids, (start,) = _tokens(prompt + completion, [len(prompt)], tokenizer, where)
        labels = [IGNORED] * start + ids[start:]
        if ids[-1] != tokenizer.eos_token_id:
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        beginning = self._beginning(ids)
        ids, labels = [*beginning, *ids], [IGNORED] * len(beginning) + labels
        return self._cut(ids, labels, where)

    def _beginning(self, ids: list[int]) -> list[int]:
        """The bos token, where the tokenizer puts one and the text does not have it yet."""
        bos = self._tokenizer.bos_token_id
        # asked of the tokenizer: GPT-2's has a bos token, and puts none in front of a text
        puts_one = bos is not None and self._tokenizer("")["input_ids"][:1] == [bos]
        return [bos] if puts_one and ids[:1] != [bos] else []

    def _cut(self, ids: list[int], labels: list[int], where: str) -> Encoded:
        if all(label == IGNORED for label in labels):
            raise DataError(f"{where}: no token of the row would be supervised.")
        limit = self._max_length
        return Encoded(ids[:limit], labels[:limit], length=len(ids))


def _template(tokenizer: PreTrainedTokenizerBase, choice: str) -> ChatTemplate | None:
    if choice == "none" or not tokenizer.chat_template:
        return None
    return chat_template(tokenizer)


def _tokens(
    text: str, cuts: list[int], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    """The tokens of a text, and for each character position the number of tokens before it.

    At inference the model gets the tokens of a prefix of the text. If these are a prefix of the
    text's tokens, the text is tokenised whole. If a token reaches across a cut (two line breaks
    in one token, say), the pieces between the cuts are tokenised one by one, which is again what
    the model sees at inference.
    """

    def tokenise(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"]) if piece else []

    ids = tokenise(text)
    heads = [tokenise(text[:cut]) for cut in cuts]
    if all(ids[: len(head)] == head for head in heads):
        return ids, [len(head) for head in heads]
    bounds = [0, *cuts, len(text)]
    pieces = [tokenise(text[a:b]) for a, b in pairwise(bounds)]
    joined = [token for piece in pieces for token in piece]
    if tokenizer.decode(joined) != tokenizer.decode(ids):
        raise DataError(
            f"{where}: a token of this tokenizer reaches from the prompt into the answer, and "
            "tokenised apart they make another text. Move white space at the end of the prompt to "
            "the beginning of the completion."
        )
    places = [sum(len(piece) for piece in pieces[: i + 1]) for i in range(len(cuts))]
    return joined, places

"""Conversations as text, by the tokenizer's chat template, with the place of every answer in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from molora.errors import DataError

_PROBE = "molora"


@dataclass(frozen=True)
class Rendered:
    """A text, and the answers in it as (start, stop) character positions, stop token included."""

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template and how it ends the assistant's turn."""

    tokenizer: PreTrainedTokenizerBase
    stop_id: int
    """The token that stops generation, the last of ``stop``."""
    stop: str
    """The special tokens behind an answer; mostly one, Command R7B's template has two."""

    def render(self, messages: list[dict[str, Any]], where: str) -> list[Rendered]:
        """The training texts of a conversation; its answers are exactly what the model must write.

        An answer starts where the template's generation prompt ends, and ends with the first
        token that stops generation: rendered prefix by prefix, as at inference. Where the template
        writes every turn alike, one text holds all answers. Where it writes earlier turns in
        another way than the last one (without their thinking, say), each answer gets a text of its
        own, ending with it: only so is every answer seen in the context in which it is generated.

        Raises:
            DataError: when the template refuses the conversation, when its generation prompt is
                not how an assistant's turn begins, and when a turn does not end with a stop token.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        parts = [self._turn(messages[: i + 1], where) for i in turns]
        full = self._text(messages, where, prompt=False)
        stops = [part.answers[0][1] for part in parts]
        if all(full.startswith(p.text[:stop]) for p, stop in zip(parts, stops, strict=True)):
            return [Rendered(full, tuple(part.answers[0] for part in parts))]
        return parts

    def prompt(self, messages: list[dict[str, Any]], where: str) -> Rendered:
        """The text after which the model writes the next turn, as `render` has it before an answer.

        Earlier answers are marked where the template writes every turn alike.

        Raises:
            DataError: when the template refuses the conversation.
        """
        text = self._text(messages, where, prompt=True)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        parts = [self._turn(messages[: i + 1], where) for i in turns]
        alike = all(text.startswith(part.text[: part.answers[0][1]]) for part in parts)
        return Rendered(text, tuple(part.answers[0] for part in parts) if alike else ())

    def _turn(self, messages: list[dict[str, Any]], where: str) -> Rendered:
        """The conversation up to an answer, that answer being the only one marked."""
        before = self._text(messages[:-1], where, prompt=True)
        text = self._text(messages, where, prompt=False)
        if not text.startswith(before):
            raise DataError(
                f"{where}: the chat template's prompt for an answer ends with {before[-30:]!r}, "
                f"but its finished conversation does not begin with that prompt, so the loss "
                "cannot be put on the answer. Use another template, or prompt and completion with "
                "chat_template: none."
            )
        tail = text.rfind(self.stop)
        stop = tail + len(self.stop)
        # Phi-3's template puts an eos after the stop token of a finished conversation
        rest = text[stop:].replace(str(self.tokenizer.eos_token), "")
        if tail < len(before) or rest.strip():
            raise DataError(
                f"{where}: the chat template ends the assistant's turn with {text[-30:]!r}, not "
                f"with the stop token {self.stop!r}, so the model would not learn to stop."
            )
        return Rendered(text, ((len(before), stop),))

    def _text(self, messages: list[dict[str, Any]], where: str, *, prompt: bool) -> str:
        try:
            # transformers renders in jinja2's immutable sandbox: a template is code from strangers
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except SecurityError as error:
            raise DataError(
                f"{where}: the chat template tries what a template may not do: {error}. Do not use "
                "this tokenizer's template: chat_template: none."
            ) from error
        except Exception as error:  # a stranger's code can raise anything
            raise DataError(
                f"{where}: the chat template refuses this conversation: {error}"
            ) from error
        assert isinstance(text, str)
        return text


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The tokenizer's template (it must have one), with the stop token that renderings show.

    Raises:
        DataError: when assistant turns end with plain text: a model trained so never stops; and
            when the template leaves out the text of messages.
    """
    ids, tail = _after_answer(tokenizer, [])
    known = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    if not ids or ids[0] not in known:
        raise DataError(
            f"the chat template ends the assistant's turn with {tail!r}, which is not a token of "
            "its own: the model would not learn to stop. Use a template that ends turns with a "
            "special token, or prompt and completion with chat_template: none."
        )
    # what ends every turn; Phi-3's template has an eos more behind the last one
    following, _ = _after_answer(tokenizer, [{"role": "user", "content": "?"}])
    common = [
        token
        for place, token in enumerate(ids)
        if known.issuperset(ids[: place + 1]) and ids[: place + 1] == following[: place + 1]
    ]
    stops = common or ids[:1]
    text = "".join(map(str, tokenizer.convert_ids_to_tokens(stops)))
    return ChatTemplate(tokenizer, stop_id=stops[-1], stop=text)


def _after_answer(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]]
) -> tuple[list[int], str]:
    """Tokens and text that a template puts behind an answer that these turns follow."""
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    template = ChatTemplate(tokenizer, stop_id=-1, stop="")
    text = template._text([*probe, *turns], "chat template", prompt=False)
    _, found, tail = text.rpartition(_PROBE)
    if not found:
        raise DataError(
            f"the chat template leaves out the text of messages: it makes {text!r} of the answer "
            f"{_PROBE!r}. Use a template for contents that are strings, or prompt and completion "
            "with chat_template: none."
        )
    return list(tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]), tail

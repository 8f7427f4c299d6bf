"""Conversations as text, by the tokenizer's chat template, with the place of every answer in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
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
    """A tokenizer's chat template and the token by which it ends the assistant's turn."""

    tokenizer: PreTrainedTokenizerBase
    stop_id: int
    stop: str

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
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(
                f"{where}: the chat template refuses this conversation: {error}"
            ) from error
        assert isinstance(text, str)
        return text


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The tokenizer's template (it must have one), with the stop token that a rendering shows.

    Raises:
        DataError: when assistant turns end with plain text: a model trained so never stops.
    """
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    template = ChatTemplate(tokenizer, stop_id=-1, stop="")
    tail = template._text(probe, "chat template", prompt=False).rpartition(_PROBE)[2].lstrip()
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    known = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    if not ids or ids[0] not in known:
        raise DataError(
            f"the chat template ends the assistant's turn with {tail!r}, which is not a token of "
            "its own: the model would not learn to stop. Use a template that ends turns with a "
            "special token, or prompt and completion with chat_template: none."
        )
    stop = tokenizer.convert_ids_to_tokens(ids[0])
    return ChatTemplate(tokenizer, stop_id=ids[0], stop=str(stop))

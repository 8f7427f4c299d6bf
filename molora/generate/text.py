"""Prompts → continuations, rendered, padded and stopped as the model was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from molora.data import RowEncoder, padding_id
from molora.errors import ConfigError, DataError
from molora.generate.batches import by_length, evaluating, left_padded
from molora.generate.decoding import Decoding
from molora.generate.load import Loaded

Prompt = str | Sequence[Mapping[str, Any]]
"""A user's words, or the messages of a conversation up to the turn that is to be written."""
Deciding = Callable[[Sequence[str]], AbstractContextManager[StoppingCriteriaList]]
"""Texts of a batch → a context in which they decide, and what renews gates while it is written:
`molora.compose.text_router.TextRouter.deciding`."""


def generate_texts(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    chat_template: Literal["auto", "none"] = "auto",
    batch_size: int = 8,
    on_text: Callable[[str], None] | None = None,
    deciding: Deciding | None = None,
) -> list[str]:
    """The continuation of every prompt, without the prompt and without the stop token.

    Prompts become exactly the tokens that stand before an answer in training. Padding goes by
    attention mask, so a prompt in a batch is continued as it is alone. Writing ends at the end of
    an assistant's turn, or at any stop token of the base model's generation config.

    Args:
        on_text: gets the text piece by piece while it is written; with one prompt and no beams.
        deciding: lets the prompts' texts decide, for a mixture whose router is "given". Of a
            conversation all messages are one text.

    Other arguments: see :class:`Decoding`; `chat_template` as in :class:`molora.data.RowEncoder`.

    Raises:
        DataError: no prompts, an empty one, or one that with `max_new_tokens` exceeds the length
            that the model can read.
        ConfigError: an impossible setting.
    """
    decoding = Decoding.parse(
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "num_beams": num_beams,
            "seed": seed,
            "batch_size": batch_size,
        }
    )
    if on_text is not None and (len(prompts) != 1 or num_beams != 1):
        raise ConfigError(
            f"text can be followed for one prompt without beams, not {len(prompts)} prompts with "
            f"num_beams={num_beams}. Leave on_text out."
        )
    encoder = RowEncoder(loaded.tokenizer, chat_template=chat_template)
    prompt_ids = _prompt_ids(loaded, encoder, prompts, decoding)
    stop_ids = _stop_ids(loaded, encoder)
    stream = None if on_text is None else TokenStream(loaded.tokenizer, stop_ids, on_text)
    texts = [""] * len(prompts)
    with evaluating(loaded.model), torch.random.fork_rng():
        torch.manual_seed(decoding.seed)
        for chunk in by_length(prompt_ids, decoding.batch_size):
            texts_B = [text_of(prompts[i]) for i in chunk]
            with nullcontext() if deciding is None else deciding(texts_B) as criteria:
                written = _continue(
                    *(loaded, [prompt_ids[i] for i in chunk], decoding, stop_ids),
                    stream=stream,
                    criteria=criteria,
                )
            for i, ids in zip(chunk, written, strict=True):
                texts[i] = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def text_of(prompt: Prompt) -> str:
    """What a text router reads of a prompt; of a conversation, message after message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content", "")) for message in prompt)


def _prompt_ids(
    loaded: Loaded, encoder: RowEncoder, prompts: Sequence[Prompt], decoding: Decoding
) -> list[list[int]]:
    if not prompts:
        raise DataError("there is no prompt to continue. Give at least one.")
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise DataError(f"prompt {number} is empty. Give it some text.")
        ids = encoder.prompt(prompt, f"prompt {number}")
        if limit is not None and len(ids) + decoding.max_new_tokens > limit:
            raise DataError(
                f"prompt {number} has {len(ids)} tokens, which with max_new_tokens="
                f"{decoding.max_new_tokens} exceeds the {limit} positions of this model. Shorten "
                "the prompt or lower max_new_tokens."
            )
        encoded.append(ids)
    return encoded


def _stop_ids(loaded: Loaded, encoder: RowEncoder) -> list[int]:
    configured = loaded.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({encoder.stop_id, *(token for token in listed if token is not None)})


def _continue(
    loaded: Loaded,
    prompt_ids: list[list[int]],
    decoding: Decoding,
    stop_ids: list[int],
    *,
    stream: TokenStream | None,
    criteria: StoppingCriteriaList | None,
) -> list[list[int]]:
    """New token ids per prompt, up to the first stop token."""
    pad = padding_id(loaded.tokenizer)
    input_ids_BS, mask_BS = left_padded(prompt_ids, pad, device=loaded.model.device)
    sampled = decoding.temperature > 0
    # every field that ours replace is set: what is None, transformers takes from the base model
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=sampled,
        temperature=decoding.temperature if sampled else 1.0,
        top_p=decoding.top_p if sampled else 1.0,
        top_k=0 if sampled else 50,
        num_beams=decoding.num_beams,
        num_return_sequences=1,
        eos_token_id=stop_ids,
        pad_token_id=pad,
        use_cache=True,
        return_dict_in_generate=False,
    )
    ids_BS = loaded.model.generate(
        input_ids_BS,
        attention_mask=mask_BS,
        generation_config=config,
        streamer=stream,
        stopping_criteria=criteria,
    )
    return [until_stop(row, stop_ids) for row in ids_BS[:, input_ids_BS.shape[1] :].tolist()]


def until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    """The ids before the first stop token: what follows it is padding."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


class TokenStream:
    """Calls `on_text` with whole characters while tokens come: a streamer of transformers.

    A token may end inside a character or a word's spelling, so all tokens so far are decoded and
    what is new is passed on once it no longer ends with half a character.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        on_text: Callable[[str], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._on_text = on_text
        self._ids: list[int] | None = None
        self._shown = ""

    def put(self, ids: torch.Tensor) -> None:
        """New tokens; the first call brings the prompt."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.reshape(-1).tolist()
        self._show(final=False)

    def end(self) -> None:
        """No more tokens."""
        self._show(final=True)

    def _show(self, *, final: bool) -> None:
        text = self._tokenizer.decode(
            until_stop(self._ids or [], self._stop_ids), skip_special_tokens=True
        )
        assert isinstance(text, str)
        if text != self._shown and (final or not text.endswith("\ufffd")):
            self._on_text(text[len(self._shown) :])
            self._shown = text

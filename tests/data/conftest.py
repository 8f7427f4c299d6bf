"""Tokenizers made in the process, and the chat templates of well-known model families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Write a function that adds two numbers.\n\ndef add(a, b):\n    return a + b\n",
    "user assistant system model think 0123456789",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# SmolLM2 and Qwen2.5: a system prompt of their own where the conversation has none
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>"
    "{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% else %} {{ message['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# ends a finished conversation, and only that, with one more eos
PHI3 = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Qwen3: earlier turns lose their thinking, the last one has a thinking part, if need be empty
QWEN3 = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.last %}{% set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}"
    "{% endif %}{% endif %}<|im_start|>{{ message['role'] }}\n{{ content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A chat template, its tokens, and what it makes of an assistant's content."""

    template: str
    stop: str
    eos: str
    trims: bool = False
    pieces: str = "bytes"

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        # the stop token is the padding token, so that a mask by token id would hide every stop
        return make_tokenizer(self.template, self.eos, self.pieces, pad=self.stop)


FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", "<|im_end|>"),
    "smollm2": Family(DEFAULT_SYSTEM, "<|im_end|>", "<|im_end|>"),
    "llama3": Family(LLAMA3, "<|eot_id|>", "<|end_of_text|>", trims=True),
    "gemma": Family(GEMMA, "<end_of_turn>", "<eos>", trims=True),
    "mistral": Family(MISTRAL, "</s>", "</s>", pieces="metaspace"),
    "zephyr": Family(ZEPHYR, "</s>", "</s>", pieces="metaspace"),
    "phi3": Family(PHI3, "<|end|>", "<|endoftext|>"),
}

SPECIAL = sorted(
    {"<s>", "[INST]", "[/INST]", "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>"}
    | {"<start_of_turn>", "<|user|>", "<|assistant|>", "<|system|>"}
    | {token for family in FAMILIES.values() for token in (family.stop, family.eos)}
)


@cache
def make_tokenizer(
    template: str | None, eos: str, pieces: str = "bytes", pad: str | None = None
) -> PreTrainedTokenizerFast:
    core = _byte_level() if pieces == "bytes" else _metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token=pad or eos
    )
    tokenizer.chat_template = template
    return tokenizer


def _byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    # Llama 3's and Qwen's rule, in which line breaks before a word are one piece
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # the merges come to include "\n\n", a token that can reach from a prompt into an answer
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*SENTENCES, *["a\n\n\n"] * 20], trainer)
    return core


def _metaspace() -> Tokenizer:
    """SentencePiece's way: spaces become ▁, unknown characters bytes."""
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIAL])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]:
        vocab.setdefault(token, len(vocab))
    vocab["▁a"] = len(vocab)
    core = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens(SPECIAL)
    return core


@pytest.fixture(params=FAMILIES, scope="session")
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """No chat template; eos is also the padding token."""
    return make_tokenizer(None, "</s>")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    return FAMILIES["smollm2"].tokenizer


@pytest.fixture(scope="session")
def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return FAMILIES["gemma"].tokenizer


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(QWEN3, "<|im_end|>")


@pytest.fixture(scope="session")
def tokenizer_with() -> Callable[..., PreTrainedTokenizerFast]:
    """(template, eos, "bytes" or "metaspace") → tokenizer."""
    return make_tokenizer

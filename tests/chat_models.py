"""A tiny random chat model in a directory, and mixtures saved for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_models import randomize, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from molora import MixtureConfig

END, PAD = "<|im_end|>", "<pad>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte; eos is not the end of a turn, as in many chat models."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token=PAD)
    tokenizer.chat_template = template
    return tokenizer


def chat_model(family: str = "llama", **overrides: Any) -> Any:
    """A random model of `family` for that tokenizer, with room for longer texts."""
    tokenizer = chat_tokenizer()
    room = {"n_positions" if family == "gpt2" else "max_position_embeddings": 256}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return tiny(
        family,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        **{**room, **ids, **overrides},
    )


def save_chat_model(directory: Path, **overrides: Any) -> Path:
    """A Llama with its tokenizer, as `from_pretrained` reads it."""
    chat_model(**overrides).save_pretrained(directory)
    chat_tokenizer().save_pretrained(directory)
    return directory


def save_adapter(
    directory: Path, base: Path, config: MixtureConfig | None = None, **overrides: Any
) -> Path:
    """A randomised MoLA, or `config`, for the model that `save_chat_model` put into `base`."""
    from transformers import AutoModelForCausalLM

    import molora

    config = config or molora.presets.mola(num_experts=3, rank=2, dropout=0.0)
    mixture = molora.attach(AutoModelForCausalLM.from_pretrained(base), config)
    randomize(mixture)
    mixture.save(directory)
    return directory

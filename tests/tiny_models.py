"""Tiny random Hugging Face models of every family that molora knows, ragged batches for them, and
mixtures whose experts do something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

if TYPE_CHECKING:  # references in tests import nothing from molora
    from molora import Mixture

VOCAB = 96
PAD = 0

# in ≠ out at q_proj too: heads are wider than hidden / heads
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GEMMA = {**DECODER, "tie_word_embeddings": True, "query_pre_attn_scalar": 12, "sliding_window": 8}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_inner": 40,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_ff": 40,
    "d_kv": 12,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "eos_token_id": 2,
    "decoder_start_token_id": PAD,
}
MOE = {**DECODER, "num_experts_per_tok": 2}

# family → (model class, config class, settings)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**MOE, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**MOE, "num_experts": 4, "moe_intermediate_size": 24},
    ),
}
CAUSAL = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"),
    *("mixtral", "qwen3_moe"),
]
CLASSIFIERS = ["bert", "roberta"]
ENCODER_DECODERS = ["t5", "t5_gated"]


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random model of `family` in evaluation mode, the same for the same arguments; `overrides`
    are settings of its config."""
    model_class, config_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, model_class)(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start at zero, which would hide a bias counted twice
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def randomize(mixture: Mixture, std: float = 0.3, *, seed: int = 0) -> None:
    """Give all lora_B and routers random values, so that experts differ, routers decide and the
    base is left."""
    source = torch.Generator().manual_seed(seed)
    for name, tensor in mixture.state_dict().items():
        if name.endswith("lora_B") or "router." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=source) * std)


def sequences(lengths: Sequence[int], *, seed: int = 0) -> list[Tensor]:
    """Random token ids of the given lengths, free of special tokens."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=source) for length in lengths]


def padded(
    rows: Sequence[Tensor], *, side: str = "right", extra: int = 0, value: int = PAD
) -> Tensor:
    """Rows of different lengths as one tensor, with `extra` more columns of padding."""
    length = max(row.numel() for row in rows) + extra
    batch = torch.full((len(rows), length), value)
    for filled, row in zip(batch, rows, strict=True):
        if side == "right":
            filled[: row.numel()] = row
        else:
            filled[length - row.numel() :] = row
    return batch


def batch_for(
    model: nn.Module,
    lengths: Sequence[int] = (7, 4, 5),
    *,
    seed: int = 0,
    side: str = "right",
    extra: int = 0,
    labels: bool = True,
) -> dict[str, Tensor]:
    """Keyword arguments for a forward of `model`: ragged sequences, their mask, and labels of the
    right kind."""
    rows = sequences(lengths, seed=seed)
    pad: Callable[..., Tensor] = lambda values, value: padded(  # noqa: E731
        values, side=side, extra=extra, value=value
    )
    batch = {
        "input_ids": pad(rows, PAD),
        "attention_mask": pad([torch.ones_like(row) for row in rows], 0),
    }
    if getattr(model.config, "is_encoder_decoder", False):
        # of other lengths in another order, so that no part of the encoder's mask is the decoder's
        batch["labels"] = pad([row[: (len(row) + 1) // 2] for row in reversed(rows)], -100)
    elif "SequenceClassification" in type(model).__name__:
        batch["labels"] = torch.arange(len(rows)) % model.config.num_labels
    else:
        # nothing predicts a first token, unless padding on its left is taken for a context
        first = [torch.cat([torch.tensor([-100]), row[1:]]) for row in rows]
        batch["labels"] = pad(first, -100)
    if not labels:
        answers = batch.pop("labels")
        if getattr(model.config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = answers.clamp_min(PAD)
            batch["decoder_attention_mask"] = (answers != -100).long()
    return batch

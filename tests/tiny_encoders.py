"""A tiny random text encoder in a directory, as package sentence-transformers lays one out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<cls>", "<sep>", "<unk>"]
POSITIONS = 24


def byte_tokenizer(*, special: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte; `special`: between <cls> and <sep>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if special:
        core.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>", special_tokens=[("<cls>", 1), ("<sep>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")


def save_encoder(
    directory: Path, family: str = "bert", *, special: bool = True, seed: int = 0, **overrides: Any
) -> Path:
    """A random encoder with one position per byte of a text of 22 bytes."""
    tokenizer = byte_tokenizer(special=special)
    room = {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, **overrides}
    model = tiny(family, seed=seed, **room)
    getattr(model, family, model).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def set_modules(directory: Path, *, pooling: dict[str, Any] | None, steps: tuple[str, ...]) -> None:
    """The files that say how tokens become a vector."""
    paths = {"Pooling": "1_Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": paths.get(step, ""), "type": f"somewhere.{step}"}
        for i, step in enumerate(steps)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (directory / "1_Pooling").mkdir(exist_ok=True)
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def reference(
    directory: Path, texts: Sequence[str], *, keep: str = "start", cls: bool = False
) -> Tensor:
    """The unit vectors of texts, each computed alone and in float64; imports nothing of molora."""
    model = AutoModel.from_pretrained(directory).double().eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    rows = []
    for text in texts:
        first, *inner, last = tokenizer.encode(text.strip()).ids
        room = POSITIONS - 2
        inner = inner[:room] if keep == "start" else inner[max(0, len(inner) - room) :]
        with torch.no_grad():
            ids = torch.tensor([[first, *inner, last]])
            hidden_SD = model(input_ids=ids).last_hidden_state[0]
        vector_D = hidden_SD[0] if cls else torch.stack([*hidden_SD]).sum(0) / len(hidden_SD)
        rows.append(vector_D / (vector_D**2).sum().sqrt())
    return torch.stack(rows).float()

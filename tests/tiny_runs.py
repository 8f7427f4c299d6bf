"""Everything a tiny training run needs: a base model with its tokenizer in a directory, rows in
files, and configurations in YAML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<unk>", "<s>", "</s>"]

# seven small words a row, answers of one to three: no two prompts alike
ROWS = [
    {
        "prompt": " ".join(WORDS[(7 * i + j * (i + 1)) % 60] for j in range(3 + i % 4)),
        "completion": " " + " ".join(WORDS[(11 * i + 5 * j) % 60] for j in range(1 + i % 3)),
    }
    for i in range(8)
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, no padding token and no chat template."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_base(directory: Path, family: str = "llama", **overrides: Any) -> Path:
    """A tiny random model of `family` with the tokenizer, as `from_pretrained` reads it."""
    tiny(family, vocab_size=64, pad_token_id=None, **overrides).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write_rows(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_run(path: Path, base: Path, rows: Path, mixture: dict[str, Any], **sections: Any) -> Path:
    """A YAML file of a run in float32; `train` and other sections replace the defaults."""
    defaults = {"max_steps": 4, "batch_size": 4, "learning_rate": 5e-3, "logging_steps": 2}
    content = {
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": [str(rows)], **sections.pop("data", {})},
        "mixture": mixture,
        "train": {**defaults, **sections.pop("train", {})},
        "output_dir": str(path.parent / "out"),
        **sections,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a metrics.jsonl."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line["kind"] == kind]

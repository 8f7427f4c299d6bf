"""Which rows to train and to evaluate on, and how they become tokens. Pure data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, PositiveFloat, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from molora.config.base import Frozen

SIDE_COLUMNS = ("task_types", "task_ids", "cluster_ids", "expert_labels")
"""Columns of a batch, one number per sequence, that are for the mixture and not for the base."""


class Columns(Frozen):
    """The names that a source has for the columns of a row."""

    messages: str | None = None
    """Holds the conversation: a list of objects with ``role`` and ``content``."""
    prompt: str | None = None
    """Holds what the model is given."""
    completion: str | None = None
    """Holds what it is to write."""
    text: str | None = None
    """Holds a text that is learnt from first to last."""
    chosen: str | None = None
    """Holds the preferred answer: a string, a list of one message, or a whole conversation."""
    rejected: str | None = None
    """Holds the other answer, in the same form."""
    task: str | None = None
    """Holds the name of the row's task."""
    task_types: str | None = None
    """Holds LoRAMoE's task type, a number."""
    cluster_ids: str | None = None
    """Holds the row's cluster, a number."""
    expert_labels: str | None = None
    """Holds the number of the expert that the row belongs to."""
    label: str | None = None
    """Holds the right one of ``choices``."""
    choices: str | None = None
    """Holds the completions that a scorer compares."""


class DataSource(Frozen):
    """One file of rows, or a data set. A plain string stands for ``{path: …}``."""

    path: Path | None = None
    """A file, or a directory in which ``split`` chooses one; relative to the working directory."""
    name: str | None = Field(default=None, pattern=r"\S")
    """Instead of ``path``: a data set on the Hugging Face hub as ``owner/dataset``, or a directory
    that ``datasets`` reads, such as one that ``save_to_disk`` made."""
    split: str | None = None
    """The split of a data set (``train``, or a slice such as ``train[:10%]``); with a directory as
    ``path``, the file's name without its suffix (``train`` for ``train.jsonl``)."""
    subset: str | None = None
    """With ``name``: the configuration of a data set that has several."""
    revision: str | None = None
    """With ``name``: commit, tag or branch on the hub; a commit makes a run repeatable."""
    format: Literal["auto", "jsonl", "json", "parquet", "csv"] = "auto"
    """Of a file: ``auto`` goes by the suffix, and in a ``.json`` file by its first character."""
    columns: Columns | None = None
    """What the source calls a column: ``{prompt: question, completion: answer}``. If given, no
    other columns are read."""
    task: str | None = Field(default=None, min_length=1)
    """The task of every row, instead of a column ``task``."""
    task_types: int | None = Field(default=None, ge=0)
    """LoRAMoE's task type of every row, instead of a column ``task_types``."""
    cluster_ids: int | None = Field(default=None, ge=0)
    """The cluster of every row, as a method routed by clusters counts them, instead of a column
    ``cluster_ids``."""
    expert_labels: int | None = Field(default=None, ge=0)
    """The number of the expert that every row belongs to, counted from 0, instead of a column
    ``expert_labels``."""
    rows: int | None = Field(default=None, ge=1)
    """Read only the first so many rows."""
    weight: PositiveFloat | None = None
    """Share of the training examples that are drawn from this source in an epoch, relative to the
    other sources' weights; only in ``data.train``, and there on all sources or none."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str | Path) else data

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.name is None):
            given = "neither" if self.path is None else f"path={str(self.path)!r} and {self.name=}"
            given = given.replace("self.", "")
            raise ValueError(
                "a source has either `path`, for a file, or `name`, for a data set of the hub or "
                f"on disk; it has {given}."
            )
        of_data_sets = [key for key in ("subset", "revision") if getattr(self, key) is not None]
        if self.path is not None and of_data_sets:
            raise ValueError(
                f"`{of_data_sets[0]}` is for data sets given by `name`, but the source has "
                f"path={str(self.path)!r}. Leave it out, or give the data set as `name`."
            )
        if self.name is not None and self.format != "auto":
            raise ValueError(
                f"format={self.format!r} is for files given by `path`, but the source has "
                f"name={self.name!r}. Leave it out."
            )
        return self

    @property
    def shown(self) -> str:
        """What messages call it: ``data/train.jsonl``, ``owner/dataset/subset[split]``."""
        place = str(self.path) if self.name is None else self.name
        subset = f"/{self.subset}" if self.subset else ""
        return place + subset + (f"[{self.split}]" if self.split else "")

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # editors that check a YAML against `molora schema` must accept the plain string too
        return {"anyOf": [{"type": "string", "format": "path"}, handler(core_schema)]}


class DataConfig(Frozen):
    """The rows of a training run, and what becomes of them."""

    train: tuple[DataSource, ...] = Field(min_length=1)
    """All read; the trainer shuffles. Without weights and temperature, an epoch is every example of
    every source once."""
    eval: tuple[DataSource, ...] = ()
    """Rows that are never trained on."""
    temperature: float | None = Field(default=None, ge=1)
    """Instead of weights: the share of a source with n examples is proportional to
    n^(1/temperature) (Raffel et al., 1910.10683, section 3.5.2, without their limit K). 1 is by
    size; the higher, the more even."""
    max_length: int = Field(default=1024, ge=2)
    """Tokens of a row that are kept; the rest is cut off at the end."""
    packing: bool = False
    """Put as many training sequences into one row of the batch as fit into ``max_length`` tokens.
    None sees another, and none is cut. ``train.batch_size`` then counts the rows after packing.
    Evaluation is never packed, so that its loss means the same."""
    chat_template: Literal["auto", "none"] = "auto"
    """``auto``: the tokenizer's, if it has one. ``none``: prompt and completion as they stand."""

    @model_validator(mode="after")
    def _one_way_of_mixing(self) -> Self:
        for number, source in enumerate(self.eval):
            if source.weight is not None:
                raise ValueError(
                    f"eval.{number} ({source.shown}) has weight={source.weight}, but evaluation "
                    "reads every row once. Leave it out."
                )
        weighted = [source for source in self.train if source.weight is not None]
        if weighted and self.temperature is not None:
            raise ValueError(
                f"temperature={self.temperature} and weight={weighted[0].weight} on "
                f"{weighted[0].shown} both set the shares of the sources. Give one of the two."
            )
        without = [source for source in self.train if source.weight is None]
        if weighted and without:
            raise ValueError(
                f"{weighted[0].shown} has a weight, but {without[0].shown} has none. Give one to "
                "every source of data.train, or to none."
            )
        return self

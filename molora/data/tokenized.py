"""From a data config to token datasets that a trainer takes as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from molora.config.data import DataConfig, DataSource
from molora.data.mask import RowEncoder
from molora.data.read import read
from molora.data.rows import Row
from molora.errors import DataError

if TYPE_CHECKING:
    # of the extra `train`: who only generates needs no data sets
    from datasets import Dataset

# Examples that are Python lists at one time; Arrow then holds them at 4 bytes a token and column.
_CHUNK = 1000
_COLUMNS = ("input_ids", "labels", "task", "task_types")


@dataclass
class Counts:
    """What became of the rows of some files."""

    rows: int = 0
    examples: int = 0
    """Rows that became training examples; a template may need one example per answer."""
    truncated: int = 0
    """Examples that ``max_length`` cut and that still have a supervised token."""
    dropped: int = 0
    """Examples left out because ``max_length`` cut off all their supervised tokens."""
    tokens: int = 0
    supervised: int = 0
    """Tokens with a loss."""


@dataclass(frozen=True)
class Tokenized:
    """Datasets with the columns ``input_ids``, ``labels`` and, where the rows have them,
    ``task_ids`` (the place of the row's task in ``tasks``) and ``task_types``."""

    train: Dataset
    train_counts: Counts
    eval: Dataset | None
    eval_counts: Counts | None
    tasks: tuple[str, ...]
    """Names of all tasks in train and eval, sorted; empty where the rows have none."""


def tokenize(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Tokenized:
    """Read, check and tokenise all files of a config; for TRL with ``skip_prepare_dataset``.

    A row that ``max_length`` cuts keeps what fits and is counted; if nothing supervised is left of
    it, it is left out and counted. Either every row of train and eval has a task or none has, and
    every row of train (of eval) has a task type or none has.

    Raises:
        DataError: for each fault of a file or row (see :func:`read` and :class:`RowEncoder`), and
            when no training or no evaluation example is left.
    """
    encoder = RowEncoder(
        tokenizer, max_length=config.max_length, chat_template=config.chat_template
    )
    tasks_seen = _AllOrNone("task")
    train, train_counts = _encode(config.train, encoder, tasks_seen)
    evaluation, eval_counts = None, None
    if config.eval:
        evaluation, eval_counts = _encode(config.eval, encoder, tasks_seen)
    names = {*train["task"], *(evaluation["task"] if evaluation is not None else ())} - {None}
    tasks = tuple(sorted(names))
    return Tokenized(
        train=_with_side_columns(train, tasks),
        train_counts=train_counts,
        eval=None if evaluation is None else _with_side_columns(evaluation, tasks),
        eval_counts=eval_counts,
        tasks=tasks,
    )


def _encode(
    sources: Sequence[DataSource], encoder: RowEncoder, tasks_seen: _AllOrNone
) -> tuple[Dataset, Counts]:
    counts, types_seen = Counts(), _AllOrNone("task_types")
    chunks, columns = [], _empty()
    for row in _rows(sources, counts):
        tasks_seen.check(row.task, row.where)
        types_seen.check(row.task_types, row.where)
        for example in encoder(row):
            if example.supervised == 0:
                counts.dropped += 1
                continue
            counts.examples += 1
            counts.truncated += example.truncated
            counts.tokens += len(example.input_ids)
            counts.supervised += example.supervised
            values = (example.input_ids, example.labels, row.task, row.task_types)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        if len(columns["task"]) >= _CHUNK:
            chunks.append(_dataset(columns))
            columns = _empty()
    chunks.append(_dataset(columns))
    if counts.examples == 0:
        raise DataError(
            f"max_length cuts all {counts.rows} rows of {', '.join(str(s.path) for s in sources)} "
            "before their first supervised token. Raise max_length, or shorten the prompts."
        )
    from datasets import concatenate_datasets

    return concatenate_datasets(chunks), counts


def _rows(sources: Sequence[DataSource], counts: Counts) -> Iterator[Row]:
    for source in sources:
        for row in read(source):
            counts.rows += 1
            yield row


def _empty() -> dict[str, list[Any]]:
    return {name: [] for name in _COLUMNS}


def _dataset(columns: dict[str, list[Any]]) -> Dataset:
    from datasets import Dataset, Features, List, Value

    tokens = List(Value("int32"))
    types = (tokens, tokens, Value("string"), Value("int64"))
    return Dataset.from_dict(columns, Features(dict(zip(_COLUMNS, types, strict=True))))


def _with_side_columns(dataset: Dataset, tasks: tuple[str, ...]) -> Dataset:
    """Task names as numbers, and no column that nothing is in."""
    if tasks:
        index = {task: number for number, task in enumerate(tasks)}
        dataset = dataset.add_column("task_ids", [index[task] for task in dataset["task"]])
    if dataset["task_types"][0] is None:
        dataset = dataset.remove_columns("task_types")
    return dataset.remove_columns("task")


@dataclass
class _AllOrNone:
    """A column that must be in every row or in none: a gap would become a wrong number."""

    name: str
    first: dict[bool, str] = field(default_factory=dict)

    def check(self, value: object, where: str) -> None:
        self.first.setdefault(value is not None, where)
        if len(self.first) == 2:
            raise DataError(
                f"{self.first[False]} has no `{self.name}`, but {self.first[True]} has one. "
                f"Give every row one (for a whole file: `{self.name}` on its source), or none."
            )

"""From a data config to token datasets that a trainer takes as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from operator import add
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PreTrainedTokenizerBase

from molora.config.data import DataConfig, DataSource
from molora.data.mask import RowEncoder
from molora.data.mixing import drawn_per_epoch, epoch_indices
from molora.data.packing import PackingRates, lengths_of, pack
from molora.data.read import read
from molora.data.rows import Body, Row, to_learn
from molora.errors import DataError

if TYPE_CHECKING:
    # of the extra `train`: who only generates needs no data sets
    from datasets import Dataset

# Examples that are Python lists at one time; Arrow then holds them at 4 bytes a token and column.
_CHUNK = 1000
_NUMBERS = ("task_types", "cluster_ids", "expert_labels")


@dataclass
class Counts:
    """What became of the rows of some files."""

    rows: int = 0
    examples: int = 0
    """Rows that became training examples; a template may need one example per answer."""
    truncated: int = 0
    """Examples that ``max_length`` cut and that still have a supervised token."""
    dropped: int = 0
    """Examples left out because ``max_length`` cut off all their supervised tokens, or of a pair
    all in which the answers differ."""
    tokens: int = 0
    supervised: int = 0
    """Tokens with a loss."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(add, astuple(self), astuple(other)))


@dataclass
class Part:
    """What one source gives."""

    source: DataSource
    counts: Counts = field(default_factory=Counts)
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens of an example before ``max_length`` cuts it → number of such examples, those that are
    left out among them."""
    drawn: int = 0
    """Examples in an epoch; of a training source, by its share."""


class Example(Protocol):
    """What `molora.data.mask.Encoded` says of itself."""

    @property
    def columns(self) -> tuple[list[int], ...]: ...
    @property
    def length(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def supervised(self) -> int: ...
    @property
    def truncated(self) -> bool: ...


@dataclass(frozen=True)
class Form:
    """What rows are turned into: answers to learn, or pairs to compare.

    Attributes:
        body: checks a row.
        encode: row → its examples.
        columns: names of the token columns, as an example has them.
    """

    body: Body
    encode: Callable[[Row], Sequence[Example]]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Tokenized:
    """Datasets with the columns ``input_ids``, ``labels`` and, where the rows have them,
    ``task_ids`` (the place of the row's task in ``tasks``), ``task_types``, ``cluster_ids`` and
    ``expert_labels``. ``train`` holds the examples of one epoch."""

    train: Dataset
    train_counts: Counts
    eval: Dataset | None
    eval_counts: Counts | None
    tasks: tuple[str, ...]
    """Names of all tasks in train and eval, sorted; empty where the rows have none."""
    train_parts: tuple[Part, ...]
    """One per source, in order."""
    eval_parts: tuple[Part, ...]
    packing: PackingRates | None = None
    """Of ``train``, whose rows then are as :func:`molora.data.pack` makes them; None where a row
    is one example."""


def tokenize(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> Tokenized:
    """Read, check, tokenise, mix and pack all sources of a config; for TRL with
    ``skip_prepare_dataset``.

    A row that ``max_length`` cuts keeps what fits and is counted; if nothing supervised is left of
    it, it is left out and counted. Either every row of train and eval has a task or none has, and
    every row of train (of eval) has a task type or none has, and likewise a cluster.

    Args:
        config: what to read.
        tokenizer: makes tokens of it.
        seed: draws the examples of an epoch where sources are mixed (see ``molora.data.mixing``).

    Raises:
        DataError: for each fault of a source or row (see :func:`read` and :class:`RowEncoder`),
            when no training or no evaluation example is left, and for a source without a share.
    """
    encoder = RowEncoder(
        tokenizer, max_length=config.max_length, chat_template=config.chat_template
    )
    found = as_datasets(config, Form(to_learn, encoder, encoder.COLUMNS), seed=seed)
    if not config.packing:
        return found
    packed = pack(found.train, config.max_length)
    lengths = lengths_of(found.train)
    rates = PackingRates(len(packed), len(lengths), sum(lengths), config.max_length)
    return replace(found, train=packed, packing=rates)


def as_datasets(config: DataConfig, form: Form, *, seed: int) -> Tokenized:
    """As `tokenize`, with rows and examples of another form."""
    tasks_seen = _AllOrNone("task")
    train, train_parts = _encode(config.train, form, tasks_seen)
    evaluation, eval_parts = _encode(config.eval, form, tasks_seen) if config.eval else (None, ())
    names = {*train["task"], *(evaluation["task"] if evaluation is not None else ())} - {None}
    tasks = tuple(sorted(names))
    return Tokenized(
        train=_mixed(_with_side_columns(train, tasks), train_parts, config, seed),
        train_counts=sum((part.counts for part in train_parts), Counts()),
        eval=None if evaluation is None else _with_side_columns(evaluation, tasks),
        eval_counts=sum((part.counts for part in eval_parts), Counts()) if eval_parts else None,
        tasks=tasks,
        train_parts=train_parts,
        eval_parts=eval_parts,
    )


def _mixed(dataset: Dataset, parts: Sequence[Part], config: DataConfig, seed: int) -> Dataset:
    """The examples of an epoch; without weights and temperature, all as they stand."""
    sizes = [part.counts.examples for part in parts]
    drawn = drawn_per_epoch(config, sizes)
    for part, count in zip(parts, drawn, strict=True):
        part.drawn = count
    return dataset if drawn == sizes else dataset.select(epoch_indices(sizes, drawn, seed).numpy())


def _encode(
    sources: Sequence[DataSource], form: Form, tasks_seen: _AllOrNone
) -> tuple[Dataset, tuple[Part, ...]]:
    parts = tuple(Part(source) for source in sources)
    numbers_seen = [_AllOrNone(name) for name in _NUMBERS]
    names = (*form.columns, "task", *_NUMBERS)
    chunks: list[Dataset] = []
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row, part in _rows(parts, form.body):
        numbers = [getattr(row, name) for name in _NUMBERS]
        tasks_seen.check(row.task, row.where)
        for seen, value in zip(numbers_seen, numbers, strict=True):
            seen.check(value, row.where)
        for example in form.encode(row):
            if _count(example, part):
                values = (*example.columns, row.task, *numbers)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
        if len(columns["task"]) >= _CHUNK:
            chunks.append(_dataset(columns, form))
            columns = {name: [] for name in names}
    chunks.append(_dataset(columns, form))
    for part in parts:
        part.drawn = part.counts.examples
    if all(part.counts.examples == 0 for part in parts):
        rows = sum(part.counts.rows for part in parts)
        raise DataError(
            f"max_length cuts all {rows} rows of {', '.join(s.shown for s in sources)} before "
            "their first supervised token, or of pairs before the answers differ. Raise "
            "max_length, or shorten the prompts."
        )
    from datasets import concatenate_datasets

    return concatenate_datasets(chunks), parts


def _count(example: Example, part: Part) -> bool:
    """Count an example; whether it is one to train on."""
    counts = part.counts
    part.lengths[example.length] += 1
    if example.supervised == 0:
        counts.dropped += 1
        return False
    counts.examples += 1
    counts.truncated += example.truncated
    counts.tokens += example.tokens
    counts.supervised += example.supervised
    return True


def _rows(parts: Sequence[Part], body: Body) -> Iterator[tuple[Row, Part]]:
    for part in parts:
        for row in read(part.source, body):
            part.counts.rows += 1
            yield row, part


def _dataset(columns: dict[str, list[Any]], form: Form) -> Dataset:
    from datasets import Dataset, Features, List, Value

    types = {name: List(Value("int32")) for name in form.columns}
    types |= {"task": Value("string"), **{name: Value("int64") for name in _NUMBERS}}
    return Dataset.from_dict(columns, Features(types))


def _with_side_columns(dataset: Dataset, tasks: tuple[str, ...]) -> Dataset:
    """Task names as numbers, and no column that nothing is in."""
    if tasks:
        index = {task: number for number, task in enumerate(tasks)}
        dataset = dataset.add_column("task_ids", [index[task] for task in dataset["task"]])
    absent = [name for name in _NUMBERS if dataset[name][0] is None]
    return dataset.remove_columns(["task", *absent])


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

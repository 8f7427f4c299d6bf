"""What a data config makes of its rows, for people to look at before they train."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from typing import Literal

from transformers import PreTrainedTokenizerBase

from molora.config.data import DataConfig, DataSource
from molora.data.mask import IGNORED, RowEncoder
from molora.data.packing import PackingRates, lengths_of, packing_rates, per_sequence
from molora.data.preference import PairEncoder, to_compare
from molora.data.read import read
from molora.data.rows import Body, Row, to_learn
from molora.data.tokenized import Tokenized

Kind = Literal["prompt", "supervised", "cut"]


@dataclass(frozen=True)
class Run:
    """Successive tokens of an example that are treated alike."""

    kind: Kind
    """Without loss, with loss, or beyond ``max_length``."""
    text: str
    tokens: int


@dataclass(frozen=True)
class Sample:
    """One example of a row, before it is cut."""

    source: str
    where: str
    """As errors name the row, which may be a row of equal name in several sources."""
    runs: tuple[Run, ...]
    answer: str = ""
    """Of a preference: ``chosen`` or ``rejected``."""

    def tokens(self, kind: Kind) -> int:
        """Number of tokens of a kind."""
        return sum(run.tokens for run in self.runs if run.kind == kind)


def samples(config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: int) -> Iterator[Sample]:
    """The examples of the first rows, taking a row from each training source in turn.

    Raises:
        DataError: as `molora.data.tokenize`.
    """
    # whole, to show what is cut off
    encode = RowEncoder(tokenizer, max_length=sys.maxsize, chat_template=config.chat_template)
    for source, row in islice(_in_turn(config.train, to_learn), rows):
        for example in encode(row):
            runs = _runs(example.input_ids, example.labels, tokenizer, config.max_length)
            yield Sample(source.shown, row.where, tuple(runs))


def pair_samples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: int
) -> Iterator[Sample]:
    """As `samples`, of preferences: the prompt with the chosen answer, then with the rejected one.

    Raises:
        DataError: as `molora.data.preference.tokenize_pairs`.
    """
    encode = PairEncoder(tokenizer, max_length=sys.maxsize, chat_template=config.chat_template)
    for source, row in islice(_in_turn(config.train, to_compare), rows):
        for pair in encode(row):
            for answer, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
                labels = [IGNORED] * len(pair.prompt_ids) + ids
                runs = _runs([*pair.prompt_ids, *ids], labels, tokenizer, config.max_length)
                yield Sample(source.shown, row.where, tuple(runs), answer)


def _in_turn(sources: Sequence[DataSource], body: Body) -> Iterator[tuple[DataSource, Row]]:
    readers = [(source, read(source, body)) for source in sources]
    while turn := [(source, row) for source, reader in readers for row in islice(reader, 1)]:
        yield from turn


def _runs(
    ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, limit: int
) -> Iterator[Run]:
    kinds: list[Kind] = [
        "cut" if place >= limit else "prompt" if label == IGNORED else "supervised"
        for place, label in enumerate(labels)
    ]
    end, text = 0, ""
    for kind, group in groupby(kinds):
        start, end = end, end + len(list(group))
        # up to here and not by itself: some tokenizers drop the space that a text begins with
        whole = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        text, before = whole, text
        yield Run(kind, whole[len(before) :], end - start)


@dataclass(frozen=True)
class Figures:
    """Numbers about the training examples of an epoch, and lengths of what the sources hold."""

    tasks: dict[str, int]
    """Task → sequences in an epoch; empty without tasks."""
    lengths: Counter[int]
    """Tokens of an example before it is cut → number of examples, all sources together."""
    packing: PackingRates | None
    """What packing makes of an epoch, or would make of it; None of preferences, which are not
    packed."""


def figures(config: DataConfig, tokenized: Tokenized) -> Figures:
    """Count what `molora.data.tokenize` made of a config."""
    train = tokenized.train
    numbers = per_sequence(train, "task_ids") if tokenized.tasks else []
    in_epoch = Counter(numbers)
    packing = tokenized.packing
    if packing is None and "input_ids" in train.column_names:
        packing = packing_rates(lengths_of(train), config.max_length)
    return Figures(
        tasks={name: in_epoch[number] for number, name in enumerate(tokenized.tasks)},
        lengths=sum((part.lengths for part in tokenized.train_parts), Counter[int]()),
        packing=packing,
    )


def quantile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the examples does not exceed."""
    needed = share * lengths.total()
    seen = 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= needed:
            return length
    return 0


def histogram(lengths: Counter[int], bins: int = 12) -> list[tuple[int, int | None, int]]:
    """(first, last, number of examples) of equal bins of a round width; the last bin is open.

    The bins reach to where all but a hundredth of the examples end, so that a few long ones do not
    put all others into one bin.
    """
    end = quantile(lengths, 0.99)
    step = _round_up(end / bins)
    first = (min(lengths) - 1) // step * step
    edges = [*range(first, end, step), math.ceil(end / step) * step]
    found = [
        (low + 1, high, sum(n for length, n in lengths.items() if low < length <= high))
        for low, high in pairwise(edges)
    ]
    beyond = sum(n for length, n in lengths.items() if length > edges[-1])
    return [*found, (edges[-1] + 1, None, beyond)] if beyond else found


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 …"""
    power = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= width)

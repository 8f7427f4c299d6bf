"""Several sequences in one row, so that fewer positions of a batch are padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from molora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    # of the extra `train`: who only generates needs no data sets
    from datasets import Dataset

# Rows whose tokens are gathered at one time: Arrow's lists count their values in 32 bits.
_CHUNK = 10_000


@dataclass(frozen=True)
class PackingRates:
    """What packing makes of sequences of given lengths."""

    bins: int
    """Rows after packing."""
    sequences: int
    """Rows before."""
    tokens: int
    width: int
    """Positions of a bin, ``max_length``."""

    @property
    def fill(self) -> float:
        """Percentage of the bins' positions that hold a token."""
        return 100 * self.tokens / (self.bins * self.width) if self.bins else 0.0

    @property
    def sequences_per_bin(self) -> float:
        return self.sequences / self.bins if self.bins else 0.0


def packing_rates(lengths: Sequence[int], max_length: int) -> PackingRates:
    """The outcome of :func:`pack` on sequences of these lengths, without packing any."""
    bins = best_fit(lengths, max_length)
    return PackingRates(len(bins), len(lengths), sum(lengths), max_length)


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """The numbers of the sequences in each bin, by best-fit decreasing.

    The longest sequence goes first, each into the fullest bin that has room for it (D. S. Johnson,
    Near-optimal bin packing algorithms, 1973; at most 11/9 of the fewest bins possible, plus 4). In
    a bin sequences keep their order, and so do bins by their first sequence: whoever reads them in
    order meets the data about as it stands. The same lengths give the same bins. O(n log n + n w)
    for n sequences and w distinct rooms left, at most ``width``.

    Raises:
        DataError: a sequence that is longer than a bin, or empty.
    """
    for number, length in enumerate(lengths):
        if not 0 < length <= width:
            raise DataError(
                f"sequence {number} has {length} tokens, but a packed row holds 1 to {width}. Cut "
                "sequences to max_length before packing, and leave out empty ones."
            )
    bins: list[list[int]] = []
    rooms: list[int] = []  # ascending, each once: the rooms that any open bin has
    with_room: dict[int, list[list[int]]] = {}
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        length = lengths[number]
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del rooms[place], with_room[room]
        else:
            room, chosen = width, []
            bins.append(chosen)
        chosen.append(number)
        left = room - length
        if left not in with_room:
            insort(rooms, left)
        with_room.setdefault(left, []).append(chosen)
    return sorted(sorted(members) for members in bins)


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """The same sequences, as many to a row as fit into ``max_length`` tokens; none is cut.

    Every column of a row is a list with one item per sequence: ``input_ids`` and ``labels`` are
    lists of lists. So nobody takes a row for one sequence by losing a column that tells them apart,
    as a trainer does that removes columns. :class:`Collator` makes batches of it.

    Raises:
        DataError: a row that is longer than ``max_length`` or empty, or a data set that is packed
            already.
    """
    from datasets import concatenate_datasets

    if is_packed(dataset):
        raise DataError(
            "the data set is packed already: its `input_ids` are lists of sequences. Pack a data "
            "set once, with one sequence per row."
        )
    bins = best_fit(lengths_of(dataset), max_length)
    chunks = [
        _packed(dataset, bins[first : first + _CHUNK]) for first in range(0, len(bins), _CHUNK)
    ]
    return concatenate_datasets(chunks) if chunks else dataset


def is_packed(dataset: Any) -> bool:
    """Whether the rows of a data set hold several sequences; False for what has no features."""
    features = getattr(dataset, "features", None) or {}
    row = getattr(features.get("input_ids"), "feature", None)
    return hasattr(row, "feature")


def lengths_of(dataset: Dataset) -> list[int]:
    """Number of tokens of each row."""
    import pyarrow.compute as pc

    lengths: list[int] = []
    for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(_CHUNK):
        lengths += pc.list_value_length(table["input_ids"]).to_pylist()
    return lengths


def per_sequence(dataset: Dataset, name: str) -> list[int]:
    """A column of one number per sequence, also where rows hold several sequences."""
    values = dataset[name]
    return [value for row in values for value in row] if is_packed(dataset) else list(values)


def _packed(dataset: Dataset, bins: Sequence[Sequence[int]]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    order = [number for members in bins for number in members]
    table: pa.Table = dataset.select(order).with_format("arrow")[:]
    ends = pa.array([0, *accumulate(len(members) for members in bins)], pa.int32())
    columns = {
        name: pa.ListArray.from_arrays(ends, table[name].combine_chunks())
        for name in table.column_names
    }
    return Dataset(pa.table(columns))

"""Rows of JSONL, JSON, parquet and CSV files and of data sets, checked one by one."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from molora.config.data import Columns, DataSource
from molora.data.hub import dataset_rows
from molora.data.rows import Body, Row, check_row, to_learn
from molora.errors import DataError

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv"}


def read(source: DataSource, body: Body = to_learn) -> Iterator[Row]:
    """The checked rows of a source, in order; columns that :class:`Row` does not have are not read.

    A file is read lazily, and by the plain parsers: ``datasets.load_dataset`` turns a column of
    ``"2024-01-01"`` into timestamps and gives no line number for a fault. Data sets given by name
    come with the types that they were published with, or that `datasets` guessed.

    Args:
        source: where they are.
        body: checks what is trained on: of supervised rows, or of preferences.

    Raises:
        DataError: naming source, row, rule and remedy, for a file that is missing, empty or of
            unknown format, for a data set that cannot be loaded, and for a row that is not of
            exactly one of the forms.
    """
    if source.path is None:
        place, records = source.shown, dataset_rows(source)
    else:
        path = _resolve(source, source.path.expanduser())
        place, records = path.name, _records(path, source)
    empty = True
    for where, fields in islice(records, source.rows):
        empty = False
        yield check_row(fields, f"{place}, {where}", source, body)
    if empty:
        raise DataError(f"{source.shown} has no rows. A source of data needs at least one.")


def _resolve(source: DataSource, path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path} does not exist. {_names_near(path)}")
    if path.is_file():
        if source.split is not None:
            raise DataError(
                f"split={source.split!r} chooses a file in a directory, but {path} is a file. "
                "Leave `split` out, or give the directory as `path`."
            )
        return path
    names = sorted(p.name for p in path.iterdir() if p.suffix in (*_SUFFIXES, ".json"))
    if source.split is None:
        found = f"Files in it: {', '.join(names) or 'none of a known format'}."
        raise DataError(f"{path} is a directory: set `split` to the stem of a file in it. {found}")
    fitting = [name for name in names if Path(name).stem == source.split]
    if len(fitting) != 1:
        raise DataError(
            f"split={source.split!r} must be the stem of one data file in {path}; "
            f"{len(fitting)} fit. Files in it: {', '.join(names) or 'none'}."
        )
    return path / fitting[0]


def _names_near(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"Its directory {parent} does not exist either; paths are relative to {Path.cwd()}."
    names = sorted(p.name for p in parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"In {parent} there is: {', '.join(close or names[:8]) or 'nothing'}."


def _records(path: Path, source: DataSource) -> Iterator[tuple[str, Any]]:
    """(place in the file, parsed row) pairs."""
    kind = _format(path) if source.format == "auto" else source.format
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        "jsonl": _jsonl,
        "json": _json,
        "csv": partial(_csv, number_columns=_number_columns(source)),
        "parquet": _parquet,
    }
    try:
        yield from readers[kind](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}). Convert it to UTF-8 first.") from None


def _format(path: Path) -> str:
    if path.suffix == ".json":
        with path.open(encoding="utf-8-sig") as file:
            return "jsonl" if file.read(4096).lstrip()[:1] == "{" else "json"
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    raise DataError(
        f"{path} has no known suffix ({', '.join([*_SUFFIXES, '.json'])}). "
        "Rename it, or set `format` on the source."
    )


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path.name}, line {number}: not JSON ({error.msg}, at {error.colno}). "
                        "A JSONL file has one JSON object a line."
                    ) from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}, line {error.lineno}: not JSON ({error.msg}). "
            "A file with one object a line has the format jsonl."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}; it must hold a list of objects.")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _number_columns(source: DataSource) -> list[str]:
    """The names that the source has for the columns of whole numbers."""
    names = source.columns or Columns()
    numbers = ("task_types", "cluster_ids", "expert_labels")
    return [getattr(names, name) or name for name in numbers]


def _csv(path: Path, number_columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Every cell is text, ``01`` and ``NA`` too; an empty cell is a column that the row lacks."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            if None in row or None in row.values():
                raise DataError(
                    f"{path.name}, row {number}: its number of cells differs from the header's. "
                    "Quote cells that hold commas or line breaks."
                )
            fields: dict[str, Any] = {name: cell for name, cell in row.items() if cell}
            for column in number_columns:
                if fields.get(column, "").isdecimal():
                    fields[column] = int(fields[column])
            yield f"row {number}", fields


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}") from None
    with file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row

"""Rows of data sets that have a name: on the Hugging Face hub, in its cache, or in a directory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.config.data import DataSource
from molora.errors import DataError

if TYPE_CHECKING:
    # of the extra `train`: who only generates needs no data sets
    from datasets import Dataset

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# what `datasets` raises for missing and damaged files, beside its own errors
_UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError)
_REMEDY = (
    "Give `name` as owner/dataset on the hub, with a subset and split that it has, in the cache or "
    "reachable from here; or a directory that `datasets` reads. A file is given by `path`."
)


def dataset_rows(source: DataSource) -> Iterator[tuple[str, Any]]:
    """(place in the data set, row) pairs of a source given by name; its rows are memory-mapped.

    No code that comes with a data set is run: `datasets` no longer does, and this asks for none.

    Raises:
        DataError: for a data set, subset, split or revision that is not there or not reachable.
    """
    directory = Path(str(source.name)).expanduser()
    dataset = _saved(source, directory) if _is_saved(directory) else _loaded(source, directory)
    number = 0
    # Arrow rows: no image is decoded, and no format that was saved with the data set applies
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        for row in table.to_pylist():
            number += 1
            yield f"row {number}", row


def _is_saved(directory: Path) -> bool:
    """Whether ``save_to_disk`` of a Dataset or DatasetDict made it."""
    return any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(source: DataSource, directory: Path) -> Dataset:
    from datasets import Dataset, load_from_disk

    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            raise DataError(
                f"{source.shown}: a data set that was saved with save_to_disk has no `{key}`, but "
                f"the source has {key}={getattr(source, key)!r}. Leave it out."
            )
    with _reported(source):
        found = load_from_disk(str(directory))
    if isinstance(found, Dataset):
        if source.split not in (None, found.split):
            raise DataError(
                f"{directory} holds one data set without splits, but the source has "
                f"split={source.split!r}. Leave `split` out."
            )
        return found
    if source.split not in found:
        raise _no_split(source, list(found))
    return found[source.split]


def _loaded(source: DataSource, directory: Path) -> Dataset:
    from datasets import get_dataset_split_names, load_dataset_builder

    if not directory.is_dir() and not _HUB_NAME.fullmatch(str(source.name)):
        raise DataError(
            f"name={source.name!r} is neither owner/dataset on the hub nor a directory. {_REMEDY}"
        )
    place = str(directory) if directory.is_dir() else source.name
    with _reported(source):
        builder = load_dataset_builder(place, source.subset, revision=source.revision)
        _check_revision(source, builder)
        if source.split is None:
            splits = get_dataset_split_names(place, source.subset, revision=source.revision)
            raise _no_split(source, splits)
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split)


def _check_revision(source: DataSource, builder: Any) -> None:
    """Offline, `datasets` takes what is newest in its cache, whatever the revision, and warns."""
    from datasets.packaged_modules.cache.cache import Cache

    if source.revision is None or not isinstance(builder, Cache):
        return
    if len(source.revision) < 7 or not str(builder.hash).startswith(source.revision):
        raise DataError(
            f"{source.shown}: revision={source.revision!r} cannot be reached, and the cache holds "
            f"the commit {builder.hash}. Go online once, or give that commit as `revision`."
        )


def _no_split(source: DataSource, splits: list[str]) -> DataError:
    return DataError(
        f"{source.name}: `split` must be one of {', '.join(map(str, splits))}, not "
        f"{source.split!r}. Set it on the source."
    )


@contextmanager
def _reported(source: DataSource) -> Iterator[None]:
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except (*_UNREADABLE, DatasetsError, ArrowException) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else f"{reason[:297]}…"
        revision = f" at revision {source.revision!r}" if source.revision else ""
        raise DataError(
            f"the data set {source.shown}{revision} cannot be loaded: {reason} {_REMEDY}"
        ) from error

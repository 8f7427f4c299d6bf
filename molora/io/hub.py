"""Adapters and mixtures on the Hugging Face hub: of a repository their two files, and no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from molora.errors import CheckpointError
from molora.io.native import MANIFEST, read_manifest
from molora.io.peft_files import CONFIG, TENSORS, UNSAFE

Fetch = Callable[[str], str]
"""Loads a file of the repository by its name."""

ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?",
    re.ASCII,
)


def adapter_directory(place: str | Path, *, allow_pickle: bool = False) -> Path:
    """The directory itself, or of "owner/name" or "owner/name@revision", which is no directory
    here, that of the hub's cache with the adapter's two files, loaded if they are not there yet.

    Args:
        place: a directory or an id.
        allow_pickle: also load `adapter_model.bin` where there is nothing else.

    Raises:
        CheckpointError: neither a directory nor an id, or the hub does not have the files.
    """
    from huggingface_hub.errors import EntryNotFoundError

    def second(directory: Path, fetch: Fetch) -> None:
        try:
            fetch(TENSORS)
        except EntryNotFoundError:
            if not allow_pickle:
                raise
            fetch(UNSAFE)

    return _directory(place, CONFIG, second, files=f"{CONFIG} and {TENSORS}")


def mixture_directory(place: str | Path) -> Path:
    """As `adapter_directory`, of a saved mixture.

    Raises:
        CheckpointError: as there, or a manifest that is damaged.
    """

    def second(directory: Path, fetch: Fetch) -> None:
        fetch(read_manifest(directory).tensors_file)

    return _directory(place, MANIFEST, second, files=f"{MANIFEST} and the file that it names")


def _directory(
    place: str | Path, first: str, second: Callable[[Path, Fetch], None], *, files: str
) -> Path:
    """The directory itself, or that of the hub's cache with `first` and what `second` fetches."""
    path = Path(place)
    if path.exists() or path.is_symlink() or isinstance(place, Path):
        return path
    found = ID.fullmatch(place)
    if found is None or ".." in place:
        raise CheckpointError(
            f"{place[:200]!a} is not a directory, and no id of the hub such as owner/name or "
            "owner/name@revision."
        )
    repository = found["repository"]
    from huggingface_hub import hf_hub_download

    try:
        directory = Path(hf_hub_download(repository, first, revision=found["revision"])).parent
        # the second file of the same commit, should the branch move meanwhile
        second(directory, partial(hf_hub_download, repository, revision=directory.name))
    except CheckpointError:
        raise
    # the hub's client and what it loads with have many, and others in each version
    except Exception as error:
        raise CheckpointError(
            f"{repository} is not a directory here, and the hub's files {files} of it cannot be "
            f"had: {ascii(str(error))[1:400]}."
        ) from None
    return directory

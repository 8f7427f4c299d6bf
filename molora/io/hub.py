"""Adapters on the Hugging Face hub: their two files, and nothing else of a repository."""

from __future__ import annotations

import re
from pathlib import Path

from molora.errors import CheckpointError
from molora.io.peft_files import CONFIG, TENSORS, UNSAFE

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
    path = Path(place)
    if path.exists() or path.is_symlink() or isinstance(place, Path):
        return path
    found = ID.fullmatch(place)
    if found is None or ".." in place:
        raise CheckpointError(
            f"{place[:200]!a} is not a directory, and no id of the hub such as owner/name or "
            "owner/name@revision."
        )
    return _loaded(found["repository"], found["revision"], allow_pickle)


def _loaded(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        directory = Path(hf_hub_download(repository, CONFIG, revision=revision)).parent
        # the second file of the same commit, should the branch move meanwhile
        commit = directory.name
        try:
            hf_hub_download(repository, TENSORS, revision=commit)
        except EntryNotFoundError:
            if not allow_pickle:
                raise
            hf_hub_download(repository, UNSAFE, revision=commit)
    # the hub's client and what it loads with have many, and others in each version
    except Exception as error:
        raise CheckpointError(
            f"{repository} is not a directory here, and the hub's files {CONFIG} and {TENSORS} of "
            f"it cannot be had: {ascii(str(error))[1:400]}."
        ) from None
    return directory

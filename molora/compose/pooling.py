"""How an encoder's tokens become one vector, by the files of package sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from molora.config.base import Frozen
from molora.errors import CheckpointError
from molora.io import sealed

MODULES = "modules.json"
KNOWN_STEPS = ("Transformer", "Pooling", "Normalize")
MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
"""Older files have a switch for each mode, newer ones its name under `pooling_mode`."""


class Pooling(Frozen):
    """What a directory says beside the model and its tokenizer."""

    mode: Literal["mean", "cls"] = "mean"
    """The mean of the tokens' states, or the first token's."""
    max_seq_length: PositiveInt | None = None
    """Tokens of a text that are read; None: as many as the model has positions for."""
    do_lower_case: bool = False
    """Whether texts are lowered before the tokenizer sees them."""


def read_pooling(directory: Path) -> Pooling:
    """The mean of all tokens, where the directory says nothing.

    Raises:
        CheckpointError: damaged files, or steps and modes that are not supported.
    """
    steps = _json(directory / MODULES, [])
    if not isinstance(steps, list):
        raise CheckpointError(f"{directory / MODULES} is no list of steps.")
    data: dict[str, Any] = {}
    for step in steps:
        kind = str(step.get("type") if isinstance(step, dict) else step).rpartition(".")[2]
        if kind not in KNOWN_STEPS:
            raise CheckpointError(
                f"{directory / MODULES} has a step {kind[:80]!a}; supported are "
                f"{', '.join(KNOWN_STEPS)}. Choose another encoder."
            )
        if kind == "Pooling":
            data["mode"] = _mode(directory, str(step.get("path", "")))
    settings = _json(directory / "sentence_bert_config.json", {})
    if isinstance(settings, dict):
        known = ("max_seq_length", "do_lower_case")
        data |= {key: settings[key] for key in known if settings.get(key) is not None}
    return Pooling.parse(data)


def _mode(directory: Path, folder: str) -> str:
    # a name of a folder right here: `..` and absolute paths lead elsewhere
    if folder in ("", "..") or Path(folder).name != folder:
        raise CheckpointError(f"{directory / MODULES} places the pooling in {folder[:80]!a}.")
    path = directory / folder / "config.json"
    settings = _json(path, None)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is missing or no set of settings.")
    named = settings.get("pooling_mode")
    modes = [named] if named is not None else []
    modes += [
        MODES.get(key, key)
        for key, value in settings.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if len(modes) != 1 or modes[0] not in MODES.values():
        raise CheckpointError(
            f"{path} pools by {modes}; supported is one of {', '.join(MODES.values())}. Choose "
            "another encoder."
        )
    return str(modes[0])


def _json(path: Path, default: Any) -> Any:
    """The file's value, or `default` if there is no such file."""
    if not path.exists():
        return default
    return sealed.parse_json(sealed.read_text(path), where=str(path))

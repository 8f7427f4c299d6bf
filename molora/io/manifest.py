"""`molora.json`: what a saved mixture is, with a checksum over itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field

from molora.config import MixtureConfig
from molora.config.base import Frozen
from molora.errors import CheckpointError, ConfigError
from molora.io.header import TensorInfo

FORMAT_VERSION = 1
CHECKSUM = "checksum"


class BaseFingerprint(Frozen):
    """What identifies the base model."""

    name: str
    """Name or path that it was loaded from; for people, not compared."""
    config_sha256: dict[str, str]
    """Setting of its configuration → hash of the value; names, versions and dtypes are left out."""
    weights_sha256: dict[str, dict[str, str]]
    """Parameter → rounding (bfloat16, float16) → hash of a sample of its values, so rounded."""


class Manifest(Frozen):
    """The JSON file without its checksum."""

    format_version: int = Field(ge=1, le=FORMAT_VERSION)
    """Version of this format."""
    molora_version: str
    """Version that wrote the file."""
    mixture: MixtureConfig
    """The configuration."""
    base: BaseFingerprint
    """The base model that the mixture was trained on."""
    tensors: dict[str, TensorInfo]
    """Every tensor of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the tensor file; its name has the first 16 digits."""

    @property
    def tensors_file(self) -> str:
        """Name of the file with the tensors."""
        return tensors_file(self.sha256)


def tensors_file(sha256: str) -> str:
    """A name that is made from the content, so that two versions never share it."""
    return f"molora-{sha256[:16]}.safetensors"


def dump_manifest(manifest: Manifest) -> str:
    """The text of the JSON file."""
    data = manifest.model_dump(mode="json")
    return json.dumps({**data, CHECKSUM: _checksum(data)}, indent=2) + "\n"


def parse_manifest(text: str, *, where: str) -> Manifest:
    """The checked content of the JSON file; `where` is its name for messages.

    Layout and order of the text are free; every value is covered by the checksum, because a
    changed alpha or temperature would load without another sign of damage.

    Raises:
        CheckpointError: damaged text, unknown keys, a newer format, values that were changed.
    """
    try:
        data = json.loads(text)
    # ValueError: text that is no JSON, and integers of too many digits
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not readable JSON: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is damaged: {type(data).__name__}, not a dict.")
    version = data.get("format_version")
    if isinstance(version, int | float) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}; this molora reads up to {FORMAT_VERSION}. "
            "Upgrade molora."
        )
    stated = data.pop(CHECKSUM, None)
    try:
        manifest = Manifest.parse(data)
    except ConfigError as error:
        raise CheckpointError(f"{where} is damaged: {_printable(str(error))}") from None
    if stated != _checksum(data):
        raise CheckpointError(
            f"{where} does not have the checksum that it states: a value was changed or damaged. "
            "Save the mixture again, or take an undamaged copy."
        )
    return manifest


def read_manifest(path: Path) -> Manifest:
    """`parse_manifest` of a file.

    Raises:
        CheckpointError: as there, or a file that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from None
    return parse_manifest(text, where=str(path))


def _checksum(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _printable(text: str) -> str:
    """Without the control characters that a damaged or hostile file could send to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)

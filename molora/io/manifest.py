"""`molora.json`: what a saved mixture is, with a checksum over itself."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from molora.config import MixtureConfig
from molora.config.base import Frozen
from molora.io import sealed
from molora.io.header import FLOATS, TensorInfo

FORMAT_VERSION = 1


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

    @field_validator("tensors")
    @classmethod
    def _are_floats(cls, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        for name, info in tensors.items():
            if info.dtype not in FLOATS.values():
                raise ValueError(
                    f"{name} is {info.dtype}; a mixture has {', '.join(FLOATS.values())}"
                )
        return tensors

    @property
    def tensors_file(self) -> str:
        """Name of the file with the tensors."""
        return tensors_file(self.sha256)


def tensors_file(sha256: str) -> str:
    """A name that is made from the content, so that two versions never share it."""
    return f"molora-{sha256[:16]}.safetensors"


def dump_manifest(manifest: Manifest) -> str:
    """The text of the JSON file."""
    return sealed.dump(manifest)


def parse_manifest(text: str, *, where: str) -> Manifest:
    """The checked content of the JSON file; `where` is its name for messages.

    Raises:
        CheckpointError: damaged text, unknown keys, a newer format, values that were changed: an
            alpha or temperature would load without another sign of damage.
    """
    return sealed.parse(
        text,
        Manifest,
        where=where,
        newest=FORMAT_VERSION,
        remedy="Save the mixture again, or take an undamaged copy.",
    )


def read_manifest(path: Path) -> Manifest:
    """`parse_manifest` of a file.

    Raises:
        CheckpointError: as there, or a file that cannot be read.
    """
    return parse_manifest(sealed.read_text(path), where=str(path))

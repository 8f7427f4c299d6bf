"""Vectors of experts in a directory: two files each, so that who trained an expert can add its."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor

from molora.compose import stored
from molora.compose.experts import NAME, FrozenExperts
from molora.compose.stored import TensorsFile
from molora.config.base import Frozen, unknown_name
from molora.errors import CheckpointError, ConfigError

FORMAT_VERSION = 1
Kind = Literal["gate", "mean"]
"""What they are: gates of PHATGOOSE (2402.05859), or mean inputs of the linears."""


class VectorsManifest(Frozen):
    """`NAME.json` without its checksum."""

    format_version: int = Field(ge=1, le=FORMAT_VERSION)
    """Version of this format."""
    kind: Kind
    """What the vectors are."""
    expert: str = Field(pattern=f"^{NAME.pattern}$")
    """The expert that they belong to, as it was called."""
    adapter: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the expert's file."""
    file: TensorsFile
    """The tensors' file: linear → (in,) float32."""


def save_vectors(
    directory: str | Path,
    vectors: Mapping[str, Mapping[str, Tensor]],
    experts: FrozenExperts,
    *,
    kind: Kind,
) -> None:
    """Write `NAME.json` and its tensors for every expert in `vectors`; other experts' files stay.

    Args:
        directory: where; made if it is not there.
        vectors: expert → linear → (in,), as `molora.compose.gate_vectors` makes them.
        experts: the set that they were made with.
        kind: what they are.

    Raises:
        ConfigError: a name that is no expert of the set.
        CheckpointError: NaN or infinity, a directory that cannot be written.
    """
    for name in vectors:
        if name not in experts.names:
            raise ConfigError(f"vectors: {unknown_name('expert', str(name), list(experts.names))}")
    for name, by_path in vectors.items():

        def describe(file: TensorsFile, name: str = name) -> VectorsManifest:
            return VectorsManifest(
                format_version=FORMAT_VERSION,
                kind=kind,
                expert=name,
                adapter=experts.adapters[name].sha256,
                file=file,
            )

        tensors = {path: vector.float().cpu() for path, vector in by_path.items()}
        stored.write(Path(directory), name, tensors, describe)


def load_vectors(
    directory: str | Path, experts: FrozenExperts, *, kind: Kind
) -> dict[str, dict[str, Tensor]]:
    """Read the vectors of every expert of a set.

    Args:
        directory: what `save_vectors` wrote, at once or one by one.
        experts: the set; its names are those of the files.
        kind: what the vectors have to be.

    Returns:
        Expert → linear → (in,) float32: the `vectors` of a router.

    Raises:
        CheckpointError: missing, damaged or changed files, vectors of another kind, of another
            version of an expert, or that do not fit its linears.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, adapter in experts.adapters.items():
        where = str(Path(directory) / f"{name}.json")
        widths = {path: module.lora_A.shape[1] for path, module in adapter.modules.items()}

        def check(
            manifest: VectorsManifest,
            where: str = where,
            sha256: str | None = adapter.sha256,
            widths: Mapping[str, int] = widths,
        ) -> TensorsFile:
            if manifest.kind != kind:
                raise CheckpointError(
                    f"{where} holds vectors of kind {manifest.kind!r}; this needs {kind!r}."
                )
            if manifest.adapter != sha256:
                raise CheckpointError(
                    f"{where} belongs to another adapter than the expert: the hashes of their "
                    "files differ. Make the vectors again."
                )
            return _fitting(where, manifest.file, widths)

        _, found[name] = stored.read(
            Path(directory), name, VectorsManifest, newest=FORMAT_VERSION, check=check
        )
    return found


def _fitting(where: str, file: TensorsFile, widths: Mapping[str, int]) -> TensorsFile:
    shapes = {path: tuple(info.shape) for path, info in file.tensors.items()}
    wrong: Sequence[str] = [
        path
        for path in {**widths, **shapes}
        if path not in widths or shapes.get(path) != (widths[path],)
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: at {wrong[0]} the expert needs a vector of shape "
            f"({widths.get(wrong[0], 'none')},), and there is {shapes.get(wrong[0], 'none')}."
        )
    return stored.expect(where, file, shapes)

"""Where each expert's texts lie in an encoder's space: one vector per expert, made from samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from molora.compose import stored
from molora.compose.encoder import Encoder, EncoderIdentity, Keep
from molora.compose.experts import Names, check_names
from molora.compose.stored import TensorsFile
from molora.config.base import Frozen, unknown_name
from molora.errors import CheckpointError, ConfigError, DataError

FORMAT_VERSION = 1
STEM = "centroids"
MIN_LENGTH = 1e-3
"""A mean of unit vectors that is shorter says nothing: its texts point everywhere."""


class CentroidsManifest(Frozen):
    """`centroids.json` without its checksum."""

    format_version: int = Field(ge=1, le=FORMAT_VERSION)
    """Version of this format."""
    names: Names
    """The experts, one row each."""
    samples: tuple[PositiveInt, ...]
    """Texts that each expert's centroid was made from."""
    instruction: str = Field(max_length=10_000)
    """What was put before every text."""
    encoder: EncoderIdentity
    """The encoder."""
    file: TensorsFile
    """The tensors' file."""


@dataclass(frozen=True, eq=False)
class Centroids:
    """Mean embeddings of the experts' texts: row e is mean_i E(instruction ⊕ x_i).

    Source: emb(φ) of LoraRetriever (2402.09997).

    Attributes:
        names: the experts in order.
        vectors_ED: float32; means of unit vectors, so of length 1 at most.
        samples: how many texts each was made from.
        instruction: put before every text, and before a text that is compared.
        encoder: the encoder that they belong to.
    """

    names: tuple[str, ...]
    vectors_ED: Tensor
    samples: tuple[int, ...]
    instruction: str
    encoder: EncoderIdentity

    def ordered(self, names: Sequence[str]) -> Centroids:
        """Those of `names`, in that order, which is to be that of the mixture's experts.

        Raises:
            ConfigError: an expert that has no centroid.
        """
        check_names(names)
        places = {name: row for row, name in enumerate(self.names)}
        for name in names:
            if name not in places:
                raise ConfigError(
                    f"{unknown_name('expert', name, list(places))} It has no centroid: give "
                    "samples of its texts."
                )
        rows = [places[name] for name in names]
        samples = tuple(self.samples[row] for row in rows)
        vectors_ED = self.vectors_ED[rows]
        return Centroids(tuple(names), vectors_ED, samples, self.instruction, self.encoder)

    def joined(self, other: Centroids) -> Centroids:
        """These experts and then those of `other`.

        Raises:
            ConfigError: an expert in both, another encoder or another instruction.
        """
        check_encoder(self.encoder, other.encoder)
        if self.instruction != other.instruction:
            raise ConfigError(
                f"centroids made with the instruction {self.instruction[:80]!r} and with "
                f"{other.instruction[:80]!r} cannot be compared. Make both with one."
            )
        names = (*self.names, *other.names)
        check_names(names)
        vectors_ED = torch.cat([self.vectors_ED, other.vectors_ED])
        samples = (*self.samples, *other.samples)
        return Centroids(names, vectors_ED, samples, self.instruction, self.encoder)

    def cosines(self, encoder: Encoder, texts: Sequence[str], *, keep: Keep = "start") -> Tensor:
        """cos(E(instruction ⊕ x), centroid) for N texts: (N, E) float32.

        Raises:
            ConfigError: another encoder than that of the centroids.
        """
        check_encoder(self.encoder, encoder.identity)
        found_ND = encoder.encode([self.instruction + text for text in texts], keep=keep)
        units_ED = torch.nn.functional.normalize(self.vectors_ED, dim=-1)
        return found_ND @ units_ED.T

    def save(self, directory: str | Path) -> None:
        """Write `centroids.json` and its tensors; centroids saved there before are replaced.

        Raises:
            CheckpointError: a directory that cannot be written.
        """

        def describe(file: TensorsFile) -> CentroidsManifest:
            return CentroidsManifest(
                format_version=FORMAT_VERSION,
                names=self.names,
                samples=self.samples,
                instruction=self.instruction,
                encoder=self.encoder,
                file=file,
            )

        stored.write(Path(directory), STEM, {"vectors": self.vectors_ED}, describe)


def build_centroids(
    encoder: Encoder, samples: Mapping[str, Sequence[str]], *, instruction: str = ""
) -> Centroids:
    """The centroid of each expert, from texts like those that it was trained on.

    Args:
        encoder: what embeds them.
        samples: the expert's name → at least one text; LoraRetriever takes a few.
        instruction: put before every text as it is; end it with a blank or line break.

    Raises:
        ConfigError: names that cannot be.
        DataError: an expert without texts, or whose texts have nothing in common.
    """
    check_names(tuple(samples))
    for name, texts in samples.items():
        if not texts or isinstance(texts, str):
            raise DataError(f"the expert {name!r} has no list of texts. Give one or more.")
    flat = [instruction + text for texts in samples.values() for text in texts]
    counts = tuple(len(texts) for texts in samples.values())
    parts = encoder.encode(flat).double().split(counts)
    vectors_ED = torch.stack([part.mean(dim=0) for part in parts]).float()
    for name, length in zip(samples, vectors_ED.norm(dim=-1).tolist(), strict=True):
        if length < MIN_LENGTH:
            raise DataError(
                f"the texts of {name!r} point everywhere: the mean of their vectors has the "
                f"length {length:.1e}. Give texts of one kind."
            )
    return Centroids(tuple(samples), vectors_ED, counts, instruction, encoder.identity)


def load_centroids(directory: str | Path) -> Centroids:
    """Read what `Centroids.save` wrote.

    Raises:
        CheckpointError: missing, damaged or changed files.
    """
    where = str(Path(directory) / f"{STEM}.json")

    def check(found: CentroidsManifest) -> TensorsFile:
        if len(found.samples) != len(found.names):
            raise CheckpointError(
                f"{where} names {len(found.names)} experts and counts the samples of "
                f"{len(found.samples)}. It is damaged."
            )
        shape = (len(found.names), found.encoder.dimension)
        return stored.expect(where, found.file, {"vectors": shape})

    found, tensors = stored.read(
        Path(directory), STEM, CentroidsManifest, newest=FORMAT_VERSION, check=check
    )
    vectors_ED = tensors["vectors"]
    if bool((vectors_ED.norm(dim=-1) < MIN_LENGTH).any()):
        raise CheckpointError(f"{where} has a centroid of length 0. Make it again.")
    return Centroids(found.names, vectors_ED, found.samples, found.instruction, found.encoder)


def check_encoder(made_with: EncoderIdentity, given: EncoderIdentity) -> None:
    """Raise ConfigError if vectors of the two encoders cannot be compared."""
    if made_with.sha256 != given.sha256:
        raise ConfigError(
            f"made with the encoder {made_with.name!r} ({made_with.sha256[:12]}), but "
            f"{given.name!r} ({given.sha256[:12]}) was given: configuration, weights, tokenizer or "
            "pooling differ. Give the same encoder, or make it again with this one."
        )

"""A mixture on a model ⇄ its directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from molora import io
from molora.attach.attach import attach
from molora.attach.fingerprint import check_same_base, fingerprint
from molora.attach.mixture import check_names_and_shapes
from molora.version import VERSION

if TYPE_CHECKING:
    from molora.attach.mixture import Mixture


def save_mixture(mixture: Mixture, directory: Path) -> None:
    """Write a mixture; see `molora.io.native.write`."""
    io.write(
        directory,
        state=mixture.state_dict(),
        mixture=mixture.config,
        base=fingerprint(mixture.model, exclude=_not_base(mixture)),
        molora_version=VERSION,
    )


def load(model: nn.Module, directory: str | Path) -> Mixture:
    """Attach the mixture that was saved in `directory` to the base model it was trained on.

    Raises:
        CheckpointError: files that are damaged or do not belong together, another base model,
            missing, unexpected or mis-shaped tensors; each is named and the model is left as it
            was.
        AttachError: the model cannot carry the mixture.
    """
    directory = Path(directory)
    manifest = io.read_manifest(directory)
    tensors = io.read_tensors(directory, manifest)
    mixture = attach(model, manifest.mixture)
    try:
        check_same_base(model, manifest.base, exclude=_not_base(mixture))
        check_names_and_shapes(
            {name: tuple(tensor.shape) for name, tensor in mixture.state_dict().items()},
            {name: info.shape for name, info in manifest.tensors.items()},
            where=f"mixture in {directory}",
        )
        mixture.load_state_dict(tensors)
    except Exception:
        mixture.detach()
        raise
    return mixture


def _not_base(mixture: Mixture) -> list[str]:
    """Names of the model's parameters that are not the frozen base's."""
    ours = {id(p) for bank in mixture.built.banks.values() for p in bank.parameters()}
    ours |= {id(p) for site in mixture.built.sites.values() for p in site.router.parameters()}
    ours |= {id(p) for p in mixture.extras.trainable()}
    return [name for name, p in mixture.model.named_parameters() if id(p) in ours]

"""A mixture on a model ⇄ its directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from molora import io
from molora.attach.attach import attach, check_attachable
from molora.attach.fingerprint import check_same_base, fingerprint
from molora.attach.mixture import check_names_and_shapes
from molora.attach.plan import make_plan
from molora.errors import AttachError, CheckpointError, ConfigError
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
        AttachError: the model carries a mixture or PEFT adapters already.
    """
    directory = Path(directory)
    manifest = io.read_manifest(directory)
    check_attachable(model)
    check_same_base(model, manifest.base)
    try:
        _check_size(model, manifest)
        tensors = io.read_tensors(directory, manifest)
        mixture = attach(model, manifest.mixture)
    except (AttachError, ConfigError) as error:
        raise CheckpointError(
            f"the configuration in {directory} does not fit its base model: {error}"
        ) from error
    try:
        _check_fits(mixture, manifest, where=f"mixture in {directory}")
        mixture.load_state_dict(tensors)
    except BaseException:
        mixture.detach()
        raise
    return mixture


def _check_size(model: nn.Module, manifest: io.Manifest) -> None:
    """Refuse more experts than there are tensors for, before attaching makes them."""
    needed = sum(
        placement.num_experts * placement.rank * placement.out_features
        for placement in make_plan(model, manifest.mixture).placements
    )
    stored = sum(math.prod(info.shape) for info in manifest.tensors.values())
    if needed > stored:
        raise CheckpointError(
            f"the configuration describes experts of at least {needed} parameters, but only "
            f"{stored} are stored. The file is damaged."
        )


def _check_fits(mixture: Mixture, manifest: io.Manifest, *, where: str) -> None:
    own = mixture.state_dict()
    check_names_and_shapes(
        {name: tuple(tensor.shape) for name, tensor in own.items()},
        {name: info.shape for name, info in manifest.tensors.items()},
        where=where,
    )
    # extra modules belong to the base, whose dtype may be another than it was
    for name in own.keys() - mixture.extras.state().keys():
        dtype = str(own[name].dtype).removeprefix("torch.")
        if manifest.tensors[name].dtype != dtype:
            raise CheckpointError(
                f"the {where} does not fit: {name} is {manifest.tensors[name].dtype}, its "
                f"configuration says {dtype}. Nothing was loaded."
            )


def _not_base(mixture: Mixture) -> list[str]:
    """Names of the model's parameters that are not the frozen base's."""
    ours = {id(p) for bank in mixture.built.banks.values() for p in bank.parameters()}
    ours |= {id(p) for site in mixture.built.sites.values() for p in site.router.parameters()}
    ours |= {id(p) for p in mixture.extras.trainable()}
    return [name for name, p in mixture.model.named_parameters() if id(p) in ours]

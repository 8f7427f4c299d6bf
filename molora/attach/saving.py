"""A mixture on a model ⇄ its directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from molora import io
from molora.attach.attach import attach, check_attachable
from molora.attach.fingerprint import Gather, check_same_base, fingerprint
from molora.attach.mixture import check_names_and_shapes
from molora.attach.plan import make_plan
from molora.errors import AttachError, CheckpointError, ConfigError
from molora.version import VERSION

if TYPE_CHECKING:
    from molora.attach.mixture import Mixture


def save_mixture(
    mixture: Mixture,
    directory: Path,
    *,
    state: dict[str, Tensor] | None = None,
    base: io.BaseFingerprint | None = None,
) -> None:
    """Write a mixture; see `molora.io.native.write`.

    Args:
        mixture: what to write.
        directory: where.
        state: its tensors, where an engine partitions the parameters; the mixture's own if not
            given.
        base: the fingerprint of its base, where that cannot be read now.
    """
    io.write(
        directory,
        state=mixture.state_dict() if state is None else state,
        mixture=mixture.config,
        base=base_fingerprint(mixture) if base is None else base,
        molora_version=VERSION,
    )


def base_fingerprint(mixture: Mixture, *, gather: Gather | None = None) -> io.BaseFingerprint:
    """The fingerprint of the frozen base below a mixture; see `fingerprint` for `gather`."""
    return fingerprint(mixture.model, exclude=_not_base(mixture), gather=gather)


def load(model: nn.Module, directory: str | Path) -> Mixture:
    """Attach the mixture that was saved in `directory` to the base model it was trained on.

    Args:
        model: the base.
        directory: where it was saved, or "owner/name" or "owner/name@revision" on the Hugging Face
            hub, of which only the mixture's two files are loaded.

    Raises:
        CheckpointError: files that are damaged or do not belong together, another base model,
            missing, unexpected or mis-shaped tensors; each is named and the model is left as it
            was.
        AttachError: the model carries a mixture or PEFT adapters already.
    """
    directory = io.mixture_directory(directory)
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


def load_values(mixture: Mixture, directory: str | Path, *, gather: Gather | None = None) -> None:
    """Copy the values saved in `directory` into a mixture that is attached, all or none.

    Its configuration may differ in what only training reads: losses, dropout, noise, starting
    values, backend and the preset's name. With `gather`, the base may be partitioned.

    Raises:
        CheckpointError: damaged files, another base model, experts or routers that compute
            something else, tensors that do not fit; each is named.
    """
    directory = Path(directory)
    manifest = io.read_manifest(directory)
    check_same_base(mixture.model, manifest.base, gather=gather)
    saved, own = (_lasting(config.model_dump()) for config in (manifest.mixture, mixture.config))
    other = [n for n in {**own, **saved} if own.get(n, "absent") != saved.get(n, "absent")]
    if other:
        shown = "; ".join(
            f"{name} is {saved.get(name, 'absent')!r} there and {own.get(name, 'absent')!r} here"
            for name in other[:4]
        )
        raise CheckpointError(
            f"the mixture in {directory} is another one: {shown}. Use its own configuration; "
            "losses, dropout, noise, backend and share_products may differ."
        )
    mixture.load_state_dict(io.read_tensors(directory, manifest))


_OF_TRAINING = {
    *("method", "losses", "backend", "share_products"),
    *("dropout", "noise_std", "jitter", "init"),
}


def _lasting(config: Any, path: str = "") -> dict[str, Any]:
    """Path → value of a dumped configuration, without what does not show after training."""
    if not isinstance(config, dict | list | tuple):
        return {path: config}
    items = config.items() if isinstance(config, dict) else enumerate(config)
    parts = [
        _lasting(value, f"{path}.{key}" if path else str(key))
        for key, value in items
        if key not in _OF_TRAINING
    ]
    return {name: value for part in parts for name, value in part.items()}


def _check_size(model: nn.Module, manifest: io.Manifest) -> None:
    """Refuse more experts than there are tensors for, before attaching makes them."""
    needed = sum(
        placement.up_parameters for placement in make_plan(model, manifest.mixture).placements
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
    ours |= {id(p) for router in mixture.built.routers.values() for p in router.parameters()}
    ours |= {id(p) for p in mixture.extras.trainable()}
    return [name for name, p in mixture.model.named_parameters() if id(p) in ours]

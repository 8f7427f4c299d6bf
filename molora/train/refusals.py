"""What a mixture cannot be trained with: each would train something else than what was asked for,
most of them silently."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from molora.attach import Mixture, packing
from molora.data.packing import is_packed
from molora.errors import AttachError, ConfigError
from molora.train import checkpointing

_PACKING = (
    "it joins the rows of a batch, or lets sequences see each other where attention is not "
    "FlashAttention's. Set data.packing in the YAML, or pack with molora.data.pack and collate "
    "with molora.data.Collator."
)
_UNSUPPORTED = {
    "packing": _PACKING,
    "eval_packing": _PACKING,
    "padding_free": _PACKING,
    "push_to_hub": "it is not supported. Upload what mixture.save wrote.",
    "use_liger_kernel": "it replaces the forwards of modules that the mixture has taken over, "
    "whose experts then do nothing.",
    "fsdp": "FSDP is not supported: it is untested, and shards what the mixture reads.",
    "parallelism_config": "tensor, context and sequence parallelism are not supported.",
}


def check_arguments(args: Any, mixture: Mixture) -> None:
    """Raise ConfigError for training arguments that cannot be combined with a mixture."""
    for name, reason in _UNSUPPORTED.items():
        if getattr(args, name, None):
            raise ConfigError(f"{name}={getattr(args, name)!r}: {reason} Leave it out.")
    checkpointing.check_settings(args)
    if getattr(args, "label_smoothing_factor", 0) and mixture.config.losses:
        raise ConfigError(
            f"label_smoothing_factor={args.label_smoothing_factor}: the trainer then makes the "
            "loss from logits alone, and the share of a micro-batch's auxiliary losses is unknown. "
            "Leave it out, or turn the losses off with losses=()."
        )


def check_keywords(keywords: dict[str, Any], mixture: Mixture) -> None:
    """Raise ConfigError for trainer arguments that cannot be combined with a mixture."""
    for name in ("peft_config", "model_init"):
        if keywords.get(name) is not None:
            raise ConfigError(
                f"{name} makes another model than the one that carries the mixture. Leave it out."
            )
    if keywords.get("compute_loss_func") is not None and mixture.config.losses:
        raise ConfigError(
            "compute_loss_func: the model then gets no labels, and the share of a micro-batch's "
            "auxiliary losses is unknown. Override compute_loss, or turn the losses off with "
            "losses=()."
        )
    _check_packing(keywords, mixture)


def _check_packing(keywords: dict[str, Any], mixture: Mixture) -> None:
    packed = [name for name in ("train_dataset", "eval_dataset") if is_packed(keywords.get(name))]
    if not packed:
        return
    if keywords.get("data_collator") is None:
        raise ConfigError(
            f"{packed[0]} is packed, which the trainer's own collator does not know: sequences in "
            "one row would see each other. Pass data_collator=molora.data.Collator(...)."
        )
    reason = packing.refusal(mixture.model)
    if reason:
        raise ConfigError(
            f"{packed[0]} is packed, but sequences in one row cannot be kept apart: {reason}. "
            "Leave packing out."
        )


def check_model(model: object, mixture: Mixture) -> None:
    """Raise AttachError unless `model` carries `mixture`."""
    if model is not mixture.model:
        raise AttachError(
            "the trainer's model is not the one that carries the mixture. Pass the model on which "
            "molora.attach was called, and the mixture that it returned."
        )


def check_head(mixture: Mixture) -> None:
    """Raise AttachError if experts are on the LM head, which TRL reads past its forward."""
    head = mixture.model.get_output_embeddings()  # type: ignore[operator]
    for placement in mixture.plan.placements:
        path = placement.module
        if mixture.model.get_submodule(path) is head:
            raise AttachError(
                f"{path} has experts, but TRL multiplies by {path}.weight itself, so they would "
                "neither act nor train. Leave the LM head out of the targets, train it whole with "
                "train_modules, or use molora.train.Trainer."
            )


def check_trained_set(mixture: Mixture, optimizer: torch.optim.Optimizer) -> None:
    """Raise AttachError unless the optimiser holds exactly the parameters that the mixture
    declares, and no other parameter of the model gets a gradient."""
    declared = {id(p) for role in mixture.trainable_parameters().values() for p in role}
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanting = {id(p) for p in mixture.model.parameters() if p.requires_grad}
    if declared == optimised == wanting:
        return
    raise AttachError(
        "what would be trained is not what the mixture declares: "
        + "; ".join(
            f"{what} {_names(mixture.model, ids)}"
            for what, ids in (
                ("not in the optimiser:", declared - optimised),
                ("in the optimiser, undeclared:", optimised - declared),
                ("with requires_grad, undeclared:", wanting - declared),
            )
            if ids
        )
        + ". Use mixture.parameter_groups, mixture.freeze, and train_modules in the config."
    )


def check_one_dtype(mixture: Mixture, stage: int | None) -> None:
    """Raise ConfigError for trained parameters of several dtypes under ZeRO-3, which lays all of
    them into one tensor."""
    trained = [(name, p.dtype) for name, p in mixture.named_parameters() if p.requires_grad]
    other = [(name, dtype) for name, dtype in trained if dtype != trained[0][1]]
    if stage == 3 and other:
        raise ConfigError(
            "ZeRO-3 trains parameters of one dtype, but {} is {} and {} is {}.".format(
                *trained[0], *other[0]
            )
            + " Load the base in the mixture's dtype, set mixture.dtype to the base's, leave out "
            "train_modules and train_tokens, or use ZeRO-2."
        )


def check_can_learn(mixture: Mixture) -> None:
    """Raise AttachError if every B is zero and frozen: experts then add nothing, and neither A nor
    routers get a gradient from the task, ever."""
    roles = mixture.trainable_parameters()
    if not (roles["experts"] or roles["router"]):
        return
    ups = [p for bank in mixture.built.banks.values() for r, p in bank.factors() if r == "B"]
    # a partitioned parameter is empty, and cannot be seen here
    if ups and all(p.numel() and not p.requires_grad and not p.any() for p in ups):
        raise AttachError(
            "B is frozen while it is zero in all experts, so these add nothing, and neither A nor "
            "routers would learn from the task. Train B first, or start from trained experts: "
            "train.start_from in a file, molora.load in code."
        )


def _names(model: nn.Module, ids: set[int]) -> str:
    names = [name for name, parameter in model.named_parameters() if id(parameter) in ids]
    foreign = len(ids) - len(names)
    shown = names[:4] + ([f"and {len(names) - 4} more"] if len(names) > 4 else [])
    return ", ".join(shown + ([f"{foreign} that the model does not have"] if foreign else []))

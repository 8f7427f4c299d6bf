"""Mixtures whose expert is a whole FFN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from molora.config import LoadBalance, Loss, MixtureConfig, RouterZ
from molora.config.base import unknown_name
from molora.errors import ConfigError
from molora.presets.assemble import Count, Targets, assemble, lora_group


def mixlora(
    *,
    num_experts: Count = 8,
    top_k: Count | None = None,
    rank: Count = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    targets: Targets = "ffn",
    attention_targets: Targets | None = "attention",
    renormalize: bool | None = None,
    variant: Literal["top_k", "top_p", "switch"] = "top_k",
    top_p: float = 0.8,
    capacity: int = 32,
    losses: Sequence[Loss] | None = None,
    **options: Any,
) -> MixtureConfig:
    """MixLoRA: whole-FFN experts behind one router per FFN, plain LoRA on attention (Li et al.,
    2404.15159).

    Variants: "top_k" (renormalised top-2), "top_p" (MixLoRA-Dynamic: the experts whose
    probabilities together exceed 0.8) and "switch" (top-1 with a capacity of 32 tokens per sequence
    and expert; a dropped token gets p · x). The last two do not renormalise, so they shift the
    base's FFN output at step 0 by the factor Σ gates − 1.

    The loss is 0.01 · E Σ f P pooled over all layers, k at uniform routing (0.01 is the paper's and
    the README's value; the code's default is 0.001); "switch" has the Switch loss and 0.001 ·
    router z-loss.

    Deviations: capacity counts no padding and acts in training only; jitter multiplies the router's
    input alone; the dynamic variant's probability temperature is left out, since it rescales
    outputs; one dropout mask serves all experts; DoRA experts are not part of this preset.

    Args:
        top_k: experts per token; 2, or 1 for "switch". "top_p" has none.
        targets: projections of the FFN.
        attention_targets: linears that get a plain LoRA; None leaves attention alone.
    """
    if variant == "top_p" and top_k is not None:
        raise ConfigError(
            f"top_k={top_k!r} has no meaning for variant='top_p', which takes as many experts as "
            "reach top_p. Leave it out, or choose another variant."
        )
    if renormalize is None:
        renormalize = variant == "top_k"
    selects: dict[str, dict[str, Any]] = {
        "top_k": {"kind": "top_k", "k": 2 if top_k is None else top_k, "renormalize": renormalize},
        "top_p": {"kind": "top_p", "p": top_p, "renormalize": renormalize},
        "switch": {
            "kind": "capacity",
            "k": 1 if top_k is None else top_k,
            "tokens": capacity,
            "renormalize": renormalize,
            "overflow": "input",
        },
    }
    if variant not in selects:
        raise ConfigError(unknown_name("variant", str(variant), selects))
    switch = variant == "switch"
    group = lora_group(
        targets=targets,
        num_experts=num_experts,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        site={"kind": "ffn"},
        router={
            "init": {"kind": "normal", "std": 1.0 if switch else 0.02},
            "jitter": 0.01 if switch else 0.0,
        },
        select=selects[variant],
    )
    groups = [group]
    if attention_targets is not None:
        plain = lora_group(
            targets=attention_targets, num_experts=1, rank=rank, alpha=alpha, dropout=dropout
        )
        groups.append(plain)
    if losses is None:
        losses = _losses(variant)
    return assemble(mixlora, *groups, losses=losses, options=options)


def _losses(variant: str) -> tuple[Loss, ...]:
    form: Literal["switch", "slots"] = "switch" if variant == "switch" else "slots"
    balance = Loss(term=LoadBalance(form=form), coefficient=0.01, scope="model")
    z_loss = Loss(term=RouterZ(), coefficient=0.001, scope="model")
    return (balance, z_loss) if variant == "switch" else (balance,)

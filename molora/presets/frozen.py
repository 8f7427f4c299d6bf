"""Routers over sets of pretrained experts: a recipe each, for `molora.compose`.

A recipe is the part of a group that decides, and the auxiliary losses: fields of `Group` by name,
and `losses`. Routers that are made from the experts' factors have nothing to train.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from molora.config.base import unknown_name
from molora.errors import ConfigError

Recipe = dict[str, Any]
TopK = int | Literal["all"] | None
"""Experts of a row; None: the published number, or all where there are fewer."""


def uniform(names: Sequence[str]) -> Recipe:
    """The mean of all experts' updates."""
    return fixed(names, weights=dict.fromkeys(names, 1 / len(names)))


def fixed(names: Sequence[str], *, weights: Mapping[str, float]) -> Recipe:
    """Σ weight_e · ΔW_e with the same weights everywhere; they need not sum to 1.

    Args:
        names: the experts.
        weights: one for each expert.
    """
    for name in weights:
        if name not in names:
            raise ConfigError(f"router.weights: {unknown_name('expert', str(name), list(names))}")
    lacking = [name for name in names if name not in weights]
    if lacking:
        raise ConfigError(
            f"router.weights has no value for {', '.join(lacking)}. Give 0 to an expert that is "
            "not to act."
        )
    router = {"kind": "fixed", "weights": [weights[name] for name in names]}
    return {"router": router, "score": {"kind": "identity"}, "select": {"kind": "dense"}}


def arrow(names: Sequence[str], *, top_k: TopK = None, temperature: float = 1.0) -> Recipe:
    """Arrow: softmax over the k largest |x · p_e|, p_e the first right-singular vector of ΔW_e, per
    token and linear (Ostapenko et al., 2405.11157).

    Updates are mixed, as by package peft (default k = 3); the authors' code mixes factors. p_e is
    exact, where package peft takes 15 steps of a power iteration from a random start.
    """
    router = {"kind": "projection", "temperature": temperature}
    return {"router": router, "select": _select(names, top_k, published=3)}


def spectr(
    names: Sequence[str], *, top_k: TopK = None, temperature: float = 1.0, relative: bool = False
) -> Recipe:
    """SpectR: softmax over the k largest ‖ΔW_e x‖, per token and linear (2504.03454).

    The scaling is part of ΔW_e, of which the paper says nothing; k = 3 and temperature 1 are
    [unverified]. `relative` divides by ‖ΔW_e‖ (ours), without which one large update wins always.
    Of an expert with DoRA, ΔW_e is c ∘ B A, without what its magnitudes make of W; so is the
    direction in Arrow.
    """
    router = {"kind": "update_norm", "temperature": temperature, "relative": relative}
    return {"router": router, "select": _select(names, top_k, published=3)}


def lag(
    names: Sequence[str],
    *,
    preselect: int = 20,
    top_k: TopK = None,
    temperature: float = 1.0,
    relative: bool = False,
) -> Recipe:
    """LAG: of the `preselect` experts with the largest |x · p_e| the k with the largest ‖ΔW_e x‖,
    for libraries of thousands (2507.05346).

    Both numbers are [unverified]. Cost of a row: E products with x, and `preselect` · R.
    """
    if preselect < 1:
        raise ConfigError(f"router.preselect={preselect}: it must be 1 or more.")
    recipe = spectr(names, top_k=top_k, temperature=temperature, relative=relative)
    recipe["router"]["preselect"] = min(preselect, len(names))
    return recipe


def phatgoose(
    names: Sequence[str], *, top_k: TopK = None, renormalize: bool = True, temperature: float = 1.0
) -> Recipe:
    """PHATGOOSE: the 2 largest of softmax(LN(x) · LN(v_e) / √in), per token and linear, v_e a gate
    vector that was trained with its expert alone (Muqeeth et al., 2402.05859).

    The authors' code renormalises in its evaluation only. Give the vectors as `vectors`.
    """
    router = {"kind": "prototype", "similarity": "layer_norm", "temperature": temperature}
    select = _select(names, top_k, published=2, renormalize=renormalize)
    return {"router": router, "select": select}


def average_activation(
    names: Sequence[str], *, top_k: TopK = None, temperature: float = 1.0
) -> Recipe:
    """softmax(x · v_e / √in), v_e the mean input of the linear over the expert's own examples,
    with norm 1 (a baseline of 2402.05859 and 2405.11157). Give the means as `vectors`."""
    router = {"kind": "prototype", "similarity": "dot", "temperature": temperature}
    return {"router": router, "select": _select(names, top_k, published=2)}


def linear(
    names: Sequence[str],
    *,
    top_k: TopK = None,
    temperature: float = 1.0,
    scope: Literal["linear", "block", "layer"] = "linear",
    bias: bool = False,
) -> Recipe:
    """A learned linear router at every linear, block or layer, top-2 by default.

    It can start from vectors given as `vectors`, or "arrow" for the experts' own directions.
    """
    router = {"kind": "linear", "temperature": temperature, "bias": bias}
    site = {"kind": "linear", "scope": scope}
    return {"site": site, "router": router, "select": _select(names, top_k, published=2)}


def mole(names: Sequence[str], *, top_k: TopK = "all", balance: float = 0.01) -> Recipe:
    """MoLE: softmax of a learned map of the experts' own outputs, at every linear (2404.13628).

    Each token decides for itself, where the paper has one gate for a whole sequence, which would
    see what comes later. `balance` weighs −log Π_e q_e, q_e the mean gate of expert e over the
    linears; the paper's value is [unverified]. Costs E² · out parameters a linear. Experts with
    DoRA are not read.
    """
    losses = [{"term": {"kind": "log_balance"}, "coefficient": balance, "scope": "model"}]
    return {
        "router": {"kind": "expert_outputs"},
        "select": _select(names, top_k, published=len(names)),
        "losses": losses if balance else [],
    }


def gate(names: Sequence[str]) -> Recipe:
    """σ(v_e · x) per token and linear: every expert acts, each with a learned gate of its own.

    PHATGOOSE's gates, whose vectors its router compares inputs with, are trained so, each with its
    expert alone and v = 0 at first (2402.05859); see `molora.compose.gate_vectors`.
    """
    recipe = linear(names, top_k="all")
    return {**recipe, "score": {"kind": "sigmoid"}}


def meteora(
    names: Sequence[str], *, top_k: TopK = None, temperature: float = 1.0, label_loss: float = 0.0
) -> Recipe:
    """MeteoRA: a learned gate at every linear, softmax over its 2 largest logits (2405.13053).

    Experts are frozen as in the paper; the authors' script trains them too. There `label_loss`, the
    coefficient of the cross entropy between every gate's logits and the sequence's expert, is 50;
    it needs `expert_labels` in training batches.
    """
    recipe = linear(names, top_k=top_k, temperature=temperature)
    return {**recipe, "losses": _label_losses(label_loss)}


def moa(names: Sequence[str], *, top_k: Literal[1, "all"] = 1, label_loss: float = 1.0) -> Recipe:
    """Mixture-of-LoRAs: one router for each layer, taught by the cross entropy with the sequence's
    expert beside the task loss (2403.03432). Experts may be trained on.

    top_k 1: the best expert alone with gate 1, which only the label loss teaches the router;
    "all": softmax over all. The paper's coefficient and its router's input are [unverified].
    Training needs `expert_labels` in the batch, unless `label_loss` is 0.
    """
    if top_k not in (1, "all"):
        raise ConfigError(f"router.top_k={top_k!r}: a mixture of LoRAs takes 1 or 'all'.")
    recipe = linear(names, top_k="all", scope="layer")
    select = {"kind": "unit_top1"} if top_k == 1 else {"kind": "dense"}
    return {**recipe, "select": select, "losses": _label_losses(label_loss)}


def _label_losses(coefficient: float) -> list[dict[str, Any]]:
    term = {"kind": "task_cross_entropy"}
    return [{"term": term, "coefficient": coefficient}] if coefficient else []


def lora_flow(names: Sequence[str], *, temperature: float = 1.0) -> Recipe:
    """LoRA-Flow: softmax(W x + b) of the layer's input, one decision for the linears of a layer
    (2402.11455)."""
    return linear(names, top_k="all", temperature=temperature, scope="layer", bias=True)


def hard_top1(
    names: Sequence[str], *, scope: Literal["linear", "block", "layer"] = "layer"
) -> Recipe:
    """The best expert alone at the scale at which it was trained, the gate with the gradient of its
    score (2606.31413; the scope is [unverified])."""
    recipe = linear(names, top_k="all", scope=scope)
    return {**recipe, "select": {"kind": "unit_top1", "straight_through": True}}


def xlora(
    names: Sequence[str],
    *,
    layerwise: bool = False,
    depth: int = 1,
    width: int = 2048,
    dropout: float = 0.2,
    softmax: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    softmax_top_k: bool = False,
    first_pass_score: float | None = 0.0,
    gate_scale: float = 1.0,
) -> Recipe:
    """X-LoRA: a classifier of the final hidden state of a first pass through the base weighs the
    experts of every token, all linears alike or each by itself (Buehler & Buehler, 2402.07148).

    Defaults are package peft's. Unlike there, decoding keeps a cache for each pass.

    Args:
        names: the experts.
        layerwise: each linear has weights of its own (`layerwise_scalings`).
        depth, width, dropout: of the classifier (`xlora_depth`, `xlora_size`, `xlora_dropout_p`).
        softmax, temperature: of the classifier's output (`enable_softmax`, `softmax_temperature`).
        top_k: experts that are kept, as they are (`top_k_lora`); None: all.
        softmax_top_k: a second softmax, over those kept (`enable_softmax_topk`).
        first_pass_score: of every expert in the first pass (`scaling_pass_value`); None: 1 / E.
        gate_scale: multiplies all gates (`global_scaling_weight`).
    """
    score = 1 / len(names) if first_pass_score is None else first_pass_score
    router = {
        "kind": "xlora",
        "layerwise": layerwise,
        "depth": depth,
        "width": width,
        "dropout": dropout,
        "temperature": temperature if softmax else 1.0,
        "first_pass_score": score,
    }
    kept = len(names) if top_k is None else top_k
    every = top_k is None and not softmax_top_k
    select = {"kind": "top_k", "k": kept, "renormalize": False, "softmax": softmax_top_k}
    return {
        "site": {"kind": "linear", "scope": "model"},
        "router": router,
        "score": {"kind": "softmax" if softmax else "identity"},
        "select": {"kind": "dense"} if every else select,
        "gate_scale": gate_scale,
    }


def given(names: Sequence[str], *, top_k: int | None = None) -> Recipe:
    """Gates come with every batch as `expert_gates`, (B, E) or (B, S, E): from an encoder of the
    text (LoraRetriever, 2402.09997; DLP-LoRA, 2410.01497), or by hand.

    Give `top_k` where no row has more gates that are not 0: only these are computed.
    """
    select = {"kind": "top_k", "k": top_k, "renormalize": False}
    return {
        "site": {"kind": "linear", "scope": "model"},
        "router": {"kind": "given"},
        "score": {"kind": "identity"},
        "select": {"kind": "dense"} if top_k is None else select,
    }


def _select(
    names: Sequence[str], top_k: TopK, *, published: int, renormalize: bool = True
) -> dict[str, Any]:
    if top_k == "all":
        return {"kind": "dense"}
    k = min(published, len(names)) if top_k is None else top_k
    return {"kind": "top_k", "k": k, "renormalize": renormalize}


ROUTERS: dict[str, Callable[..., Recipe]] = {
    "uniform": uniform,
    "fixed": fixed,
    "arrow": arrow,
    "spectr": spectr,
    "lag": lag,
    "phatgoose": phatgoose,
    "average_activation": average_activation,
    "linear": linear,
    "gate": gate,
    "mole": mole,
    "meteora": meteora,
    "moa": moa,
    "lora_flow": lora_flow,
    "hard_top1": hard_top1,
    "xlora": xlora,
    "given": given,
}
"""Name → recipe. Adding a method adds a line."""


def recipe(names: Sequence[str], router: str | Mapping[str, Any]) -> tuple[str, Recipe]:
    """The recipe of a router, and its name.

    Args:
        names: the experts.
        router: a name of `ROUTERS`, or `kind` and that recipe's arguments.

    Raises:
        ConfigError: an unknown name or argument, each with what is known.
    """
    arguments = {"kind": router} if isinstance(router, str) else dict(router)
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in ROUTERS:
        raise ConfigError(f"router: {unknown_name('kind', str(kind), ROUTERS)}")
    parameters = inspect.signature(ROUTERS[kind]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in arguments:
        if name not in known:
            raise ConfigError(f"router {kind}: {unknown_name('argument', str(name), known)}")
    needed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    for name in needed:
        if name not in arguments:
            raise ConfigError(f"router {kind} needs {name!r}.")
    return kind, ROUTERS[kind](names, **arguments)

"""What several processes train: mixtures of every kind on tiny models, the rows of every rank, and
one process that does the same job.

Routers can be set so that each rank's tokens go to experts of its own: what a mixture whose experts
are skipped when they get no token would get wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import batch_for, randomize, sequences, tiny
from torch import Tensor, nn

import molora
from molora.config import Importance, LoadBalance, Loss, MixtureConfig, RouterZ
from molora.presets import lora, loramoe, mixlora, mola
from molora.presets.frozen import recipe

LENGTHS = ((7, 4), (5, 6))
"""Lengths of the rows of rank 0 and of rank 1: as many rows, not as many tokens."""
NEW_TOKENS = [int(sequences(lengths, seed=rank)[0][2]) for rank, lengths in enumerate(LENGTHS)]
"""A token of each rank, as if it were new."""
RATE = 0.5
BALANCED = (
    Loss(term=LoadBalance(), coefficient=0.5, reduction="sum"),
    Loss(term=RouterZ(), coefficient=0.05),
)
IMPORTANT = (Loss(term=Importance(), coefficient=0.5),)
OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    # eps: else rounding of a gradient of nearly zero decides the sign of a whole step
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, eps=1e-2, weight_decay=0.01),
    # steps small enough that rounding does not grow into other choices of experts
    "slow": lambda parameters: torch.optim.AdamW(parameters, lr=0.003, eps=1e-2),
}


@dataclass(frozen=True)
class Scenario:
    """A mixture, what it is put on, and how it is trained."""

    config: MixtureConfig
    family: str = "llama"
    base_dtype: torch.dtype = torch.float32
    optimiser: str = "sgd"
    checkpointing: bool = False
    routing: str = "free"
    """ "disjoint": each rank uses one half of the experts; "order": both use all, rank 1 in another
    order; "free": as random routers decide."""
    std: float = 0.3
    """Of B and the routers at the start."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the base model."""


def linear(**group: Any) -> MixtureConfig:
    """Top-2 of 6 experts at every linear, balanced."""
    settings = {"num_experts": 6, "rank": 3, "select": {"kind": "top_k", "k": 2}, **group}
    losses = IMPORTANT if settings["select"]["kind"] == "dense" else BALANCED
    return MixtureConfig.parse({"groups": [settings], "losses": losses})


E6 = {"num_experts": 6, "rank": 3, "dropout": 0.0}
E4 = {"num_experts": 4, "rank": 3, "dropout": 0.0}
DISJOINT: dict[str, Any] = {"routing": "disjoint"}

SCENARIOS: dict[str, Scenario] = {
    "lora": Scenario(lora(rank=3, dropout=0.1)),
    "molora": Scenario(
        molora.presets.molora(num_experts=5, rank=3, losses=IMPORTANT), optimiser="adamw"
    ),
    "mola": Scenario(mola(**E6, top_k=2, losses=BALANCED), **DISJOINT),
    "mola-adamw": Scenario(mola(**E6, top_k=2, losses=BALANCED), optimiser="adamw", **DISJOINT),
    "mola-task_loss": Scenario(mola(**E6, top_k=2, losses=()), **DISJOINT),
    "mola-triangle": Scenario(mola(rank=3, losses=BALANCED), settings={"num_hidden_layers": 4}),
    "mola-order": Scenario(mola(**E4, top_k=1, renormalize=False), routing="order"),
    "mola-reference": Scenario(mola(**E6, losses=BALANCED, backend="reference"), **DISJOINT),
    "mola-grouped": Scenario(mola(**E6, losses=BALANCED, backend="grouped"), **DISJOINT),
    "mola-gather": Scenario(mola(**E6, losses=BALANCED, backend="gather"), **DISJOINT),
    "mola-dense": Scenario(mola(**E6, losses=BALANCED, backend="dense"), **DISJOINT),
    "mola-bf16_base": Scenario(mola(**E6, losses=BALANCED), base_dtype=torch.bfloat16, **DISJOINT),
    "mola-bf16_last": Scenario(
        mola(**E6, targets=r"re:.*layers\.1\.mlp\..*", losses=BALANCED),
        base_dtype=torch.bfloat16,
        **DISJOINT,
    ),
    "mola-checkpointing": Scenario(mola(**E6, losses=BALANCED), checkpointing=True, **DISJOINT),
    "loramoe": Scenario(loramoe(**E6)),
    "loramoe-dropout": Scenario(
        loramoe(num_experts=4, rank=3, dropout=0.2), optimiser="adamw", checkpointing=True
    ),
    "mixlora": Scenario(mixlora(**E6), **DISJOINT),
    "mixlora-top_p": Scenario(mixlora(**E6, variant="top_p"), optimiser="adamw", **DISJOINT),
    "mixlora-switch": Scenario(mixlora(**E4, variant="switch", capacity=2), **DISJOINT),
    "mixlora-gpt2": Scenario(mixlora(**E6), family="gpt2", **DISJOINT),
    "mixlora-grouped": Scenario(mixlora(**E6, backend="grouped"), **DISJOINT),
    "mixlora-gather": Scenario(mixlora(**E6, backend="gather"), **DISJOINT),
    "mixlora-reference": Scenario(mixlora(**E6, backend="reference"), **DISJOINT),
    "mixlora-bf16_base": Scenario(mixlora(**E6), base_dtype=torch.bfloat16, **DISJOINT),
    "mixlora-checkpointing": Scenario(
        mixlora(**E6, variant="switch", capacity=2), checkpointing=True, **DISJOINT
    ),
    "block": Scenario(linear(site={"kind": "linear", "scope": "block"}), **DISJOINT),
    "layer": Scenario(linear(site={"kind": "linear", "scope": "layer"}), **DISJOINT),
    "layer-checkpointing": Scenario(
        linear(site={"kind": "linear", "scope": "layer"}), checkpointing=True, **DISJOINT
    ),
    "per_expert_dropout": Scenario(
        linear(
            expert={"kind": "lora", "dropout": {"p": 0.2, "mask": "per_expert"}},
            select={"kind": "dense"},
        )
    ),
    "shared_a": Scenario(linear(expert={"kind": "shared_a"}), **DISJOINT),
    "extras": Scenario(
        mola(**E6, losses=BALANCED, train_modules=["lm_head"], train_tokens={"ids": NEW_TOKENS}),
        **DISJOINT,
    ),
    "t5": Scenario(mola(**E6, losses=BALANCED), family="t5"),
}


def composed(router: str | Mapping[str, Any], *, trained: bool) -> MixtureConfig:
    """Two frozen experts of unlike ranks and linears and, if `trained`, one that learns."""
    names = ["q_proj", "o_proj", "down_proj"]
    paths = [
        f"model.layers.{layer}.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}"
        for layer in range(2)
        for name in names
    ]
    experts = [
        {"name": "wide", "modules": dict.fromkeys(paths, (3, 0.7))},
        {"name": "narrow", "modules": dict.fromkeys(paths[::3], (2, 1.0))},
        {"name": "new", "modules": dict.fromkeys(paths, (3, 1.0)), "trainable": True},
    ][: 3 if trained else 2]
    kind, fields = recipe([expert["name"] for expert in experts], router)
    form = {"kind": "imported", "experts": experts, "missing": "zero"}
    group = {"targets": paths, "num_experts": len(experts), "expert": form, **fields}
    return MixtureConfig.parse({"method": kind, "groups": [group]})


SCENARIOS |= {
    "composed": Scenario(composed("linear", trained=True), optimiser="adamw"),
    "composed-layer": Scenario(composed("lora_flow", trained=True), checkpointing=True),
    "composed-xlora": Scenario(
        composed({"kind": "xlora", "layerwise": True, "depth": 2, "width": 8}, trained=False),
        checkpointing=True,
    ),
}


LONG: dict[str, Any] = {"optimiser": "slow", "std": 0.05}
CURVES: dict[str, Scenario] = {
    "lora": Scenario(lora(rank=3), **LONG),
    "molora": Scenario(molora.presets.molora(num_experts=5, rank=3), **LONG),
    "mola": Scenario(mola(**E6, losses=()), **LONG),
    "loramoe": Scenario(loramoe(**E6, losses=()), **LONG),
    "mixlora": Scenario(mixlora(**E6, losses=()), **LONG),
    "mola-balanced": Scenario(mola(**E6, losses=BALANCED), **LONG),
    "loramoe-balanced": Scenario(loramoe(num_experts=6, rank=3), **LONG),
    "mixlora-switch": Scenario(mixlora(num_experts=4, rank=3, variant="switch"), **LONG),
}
"""Every preset, trained for longer; without auxiliary losses, which are no sum over rows, they are
compared with one forward of all rows."""


def batches(
    scenario: Scenario,
    model: nn.Module,
    lengths: Sequence[Sequence[int]] = LENGTHS,
    *,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """The batch of each rank; all count the supervised tokens of all."""
    found = []
    for rank, own in enumerate(lengths):
        batch = batch_for(model, own, seed=len(lengths) * seed + rank)
        if scenario.config.method == "loramoe":
            batch["task_types"] = torch.tensor([rank, 1])
        found.append(batch)
    shift = 0 if getattr(model.config, "is_encoder_decoder", False) else 1
    total = sum(int((batch["labels"][:, shift:] != -100).sum()) for batch in found)
    return [{**batch, "num_items_in_batch": torch.tensor(total)} for batch in found]


def pooled(by_rank: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The batches of all ranks as one."""
    length = max(batch["input_ids"].shape[1] for batch in by_rank)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    one = {
        name: torch.cat(
            [
                nn.functional.pad(b[name], (0, length - b[name].shape[1]), value=value)
                for b in by_rank
            ]
        )
        for name, value in fill.items()
    }
    return {**one, "num_items_in_batch": by_rank[0]["num_items_in_batch"]}


def base_model(scenario: Scenario) -> nn.Module:
    """The model without its mixture; the values of its weights are the same in every dtype."""
    model = tiny(scenario.family, **scenario.settings)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model.to(scenario.base_dtype)


def adapted(
    scenario: Scenario,
    state: Mapping[str, Tensor] | None = None,
    *,
    model: nn.Module | None = None,
) -> molora.Mixture:
    """The mixture on its model in training mode.

    With `state`, or with experts that differ and routers that decide as the scenario says.
    """
    mixture = molora.attach(model or base_model(scenario), scenario.config, seed=3)
    model = mixture.model.train()
    if state is not None:
        mixture.load_state_dict(dict(state))
    else:
        randomize(mixture, scenario.std)
        if scenario.routing != "free":
            direct(mixture, batches(scenario, model), apart=scenario.routing == "disjoint")
    if scenario.checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": molora.checkpoint_context}
        )
    return mixture


@torch.no_grad()
def direct(mixture: molora.Mixture, by_rank: Sequence[dict[str, Tensor]], *, apart: bool) -> None:
    """Set the routers, in the order of the forward, by ridge regression on the rows they read."""
    source = torch.Generator().manual_seed(0)
    for name, site in mixture.built.sites.items():
        rows, targets = [], []
        for rank, batch in enumerate(by_rank):
            with seeded(rank):
                x_TD = _read_by(mixture, name, batch)
            num_experts = site.router.weight.shape[0]
            wanted_TE = torch.randn(x_TD.shape[0], num_experts, generator=source)
            if apart:
                half = torch.arange(num_experts) < num_experts // 2
                wanted_TE += torch.where(half == (rank == 0), 6.0, -6.0)
            else:
                # tokens take turns, on rank 1 from the last expert to the first
                turns = torch.arange(x_TD.shape[0]) % num_experts
                turns = turns if rank == 0 else num_experts - 1 - turns
                wanted_TE += 8 * nn.functional.one_hot(turns, num_experts)
            rows.append(x_TD)
            targets.append(wanted_TE)
        x_TD, wanted_TE = torch.cat(rows).double(), torch.cat(targets).double()
        gram_TT = x_TD @ x_TD.T
        gram_TT += 3e-4 * gram_TT.diagonal().mean() * torch.eye(len(gram_TT))
        site.router.weight.copy_((x_TD.T @ torch.linalg.solve(gram_TT, wanted_TE)).T)


def _read_by(mixture: molora.Mixture, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The rows, padding left out, that a router reads."""
    seen: list[Tensor] = []
    handle = mixture.built.sites[name].router.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].float())
    )
    with mixture.record() as records:
        mixture.model(**batch)
    handle.remove()
    record = records[name]
    assert isinstance(record, molora.Routing)
    return seen[0] if record.mask is None else seen[0][record.mask]


@contextlib.contextmanager
def seeded(rank: int) -> Iterator[None]:
    """Dropout and jitter of the forward inside depend on the rank alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + rank)
        yield


@dataclass
class Step:
    """What one optimiser step did."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    loss: float
    grad_norm: float


def one_process(scenario: Scenario, state: Mapping[str, Tensor] | None = None) -> Step:
    """The step as one process does it: the sum of the ranks' losses, forward by forward."""
    mixture = adapted(scenario, state)
    before = snapshot(mixture)
    by_rank = batches(scenario, mixture.model)
    parameters = [p for p in mixture.model.parameters() if p.requires_grad]
    optimiser = OPTIMISERS[scenario.optimiser](parameters)
    total = 0.0
    for rank, batch in enumerate(by_rank):
        with seeded(rank):
            loss = mixture.model(**batch).loss
        loss.backward()
        total += loss.item()
    norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()
    optimiser.step()
    return Step(before, snapshot(mixture), total, norm)


def snapshot(mixture: molora.Mixture) -> dict[str, Tensor]:
    """A copy of its state."""
    return {name: tensor.clone() for name, tensor in mixture.state_dict().items()}


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of two states with the same names."""
    return max(differences(a, b).values())


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest absolute difference of each tensor."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return {name: float((a[name].double() - b[name].double()).abs().max()) for name in a}

"""The published methods, each written out from its formula with loops over experts and tokens.

Nothing here imports molora. A linear method maps x (B, S, in), the base weight W and the weights of
its experts to its output; an FFN method replaces gate, up and down at once. `w` holds "lora_A"
(E, R, in), "lora_B" (E, out, R) and "router" (E, in) as they are stored. Biases are absent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Decision:
    """What a router decided for the tokens of x."""

    logits: Tensor
    probabilities: Tensor
    chosen: Tensor
    """(B, S, E) bool."""


def update(x: Tensor, w: Weights, e: int, scale: float) -> Tensor:
    """s · B_e A_e x."""
    return scale * (x @ w["lora_A"][e].T @ w["lora_B"][e].T)


def best(probabilities: Tensor, k: int) -> Tensor:
    """(B, S, E) bool: the k most probable experts of each token."""
    chosen = torch.zeros_like(probabilities, dtype=torch.bool)
    return chosen.scatter(-1, probabilities.topk(k, dim=-1).indices, True)


# ------------------------------------------------------------------ linears


def lora_linear(x: Tensor, W: Tensor, w: Weights, *, scale: float) -> tuple[Tensor, None]:
    """LoRA (2106.09685): y = W x + s B A x."""
    return x @ W.T + update(x, w, 0, scale), None


def soft_linear(x: Tensor, W: Tensor, w: Weights, *, scale: float) -> tuple[Tensor, Decision]:
    """MoLORA (2309.05444) and LoRAMoE (2312.09979): y = W x + Σ_e p_e s B_e A_e x."""
    logits = x @ w["router"].T
    p = logits.softmax(dim=-1)
    y = x @ W.T
    for e in range(p.shape[-1]):
        y = y + p[..., e, None] * update(x, w, e, scale)
    return y, Decision(logits, p, torch.ones_like(p, dtype=torch.bool))


def mola_linear(
    x: Tensor, W: Tensor, w: Weights, *, scale: float, k: int
) -> tuple[Tensor, Decision]:
    """MoLA (2402.08562): softmax, then top-k, then renormalised."""
    logits = x @ w["router"].T
    p = logits.softmax(dim=-1)
    chosen = best(p, min(k, p.shape[-1]))
    gates = p * chosen / (p * chosen).sum(dim=-1, keepdim=True)
    y = x @ W.T
    for e in range(p.shape[-1]):
        y = y + gates[..., e, None] * update(x, w, e, scale)
    return y, Decision(logits, p, chosen)


# ------------------------------------------------------------------ whole FFNs: MixLoRA


def expert_ffn(x: Tensor, base: Weights, w: Mapping[str, Weights], e: int, scale: float) -> Tensor:
    """FFN_e(x): the base FFN with expert e's LoRA on gate, up and down."""
    gate = x @ base["gate_proj"].T + update(x, w["gate_proj"], e, scale)
    up = x @ base["up_proj"].T + update(x, w["up_proj"], e, scale)
    hidden = silu(gate) * up
    return hidden @ base["down_proj"].T + update(hidden, w["down_proj"], e, scale)


def mixlora_ffn(
    x: Tensor,
    base: Weights,
    w: Mapping[str, Weights],
    router: Tensor,
    valid: Tensor,
    *,
    scale: float,
    k: int,
) -> tuple[Tensor, Decision]:
    """y = Σ over the top k of g_e FFN_e(x), gates renormalised."""
    logits = x @ router.T
    p = logits.softmax(dim=-1)
    chosen = best(p, k)
    gates = p * chosen / (p * chosen).sum(dim=-1, keepdim=True)
    y = sum(gates[..., e, None] * expert_ffn(x, base, w, e, scale) for e in range(p.shape[-1]))
    return y, Decision(logits, p, chosen)


def mixlora_top_p_ffn(
    x: Tensor,
    base: Weights,
    w: Mapping[str, Weights],
    router: Tensor,
    valid: Tensor,
    *,
    scale: float,
    top_p: float,
) -> tuple[Tensor, Decision]:
    """MixLoRA-Dynamic: from the best on, up to and including the one that crosses top_p."""
    logits = x @ router.T
    p = logits.softmax(dim=-1)
    chosen = torch.zeros_like(p, dtype=torch.bool)
    for row_p, row_chosen in zip(p.flatten(0, 1), chosen.view(-1, p.shape[-1]), strict=True):
        mass = 0.0
        for e in row_p.argsort(descending=True).tolist():
            row_chosen[e] = True
            mass += row_p[e].item()
            if mass > top_p:
                break
    gates = p * chosen
    y = sum(gates[..., e, None] * expert_ffn(x, base, w, e, scale) for e in range(p.shape[-1]))
    return y, Decision(logits, p, chosen)


def mixlora_switch_ffn(
    x: Tensor,
    base: Weights,
    w: Mapping[str, Weights],
    router: Tensor,
    valid: Tensor,
    *,
    scale: float,
    capacity: int,
) -> tuple[Tensor, Decision]:
    """MixLoRA-Switch in training: y = p_max FFN_e(x), or p_max x once expert e is full."""
    logits = x @ router.T
    p = logits.softmax(dim=-1)
    outputs = torch.stack([expert_ffn(x, base, w, e, scale) for e in range(p.shape[-1])])
    rows = []
    for b in range(x.shape[0]):
        served = [0] * p.shape[-1]
        for t in range(x.shape[1]):
            e = int(p[b, t].argmax())
            served[e] += int(valid[b, t])  # padding takes no place
            full = valid[b, t] and served[e] > capacity
            rows.append(p[b, t, e] * (x[b, t] if full else outputs[e, b, t]))
    return torch.stack(rows).view_as(x), Decision(logits, p, best(p, 1))


# ------------------------------------------------------------------ auxiliary losses


def no_aux(decisions: Sequence[Sequence[Decision]], valid: Tensor, types: Tensor) -> Tensor:
    return torch.zeros(())


def mola_aux(decisions: Sequence[Sequence[Decision]], valid: Tensor, types: Tensor) -> Tensor:
    """0.001 · Σ over layers of E Σ f P, the linears of a layer joined along the tokens."""
    aux = torch.zeros(())
    for layer in decisions:
        p = torch.cat([decision.probabilities[valid] for decision in layer])
        chosen = torch.cat([decision.chosen[valid] for decision in layer])
        counts = chosen.to(p.dtype).sum(dim=0)
        aux = aux + p.shape[-1] * (counts / counts.sum() * p.mean(dim=0)).sum()
    return 0.001 * aux


def loramoe_aux(decisions: Sequence[Sequence[Decision]], valid: Tensor, types: Tensor) -> Tensor:
    """0.1 · Σ over linears of var(Z)/mean(Z)², Z = importance · (1 ± 0.1)."""
    aux = torch.zeros(())
    for decision in (d for layer in decisions for d in layer):
        num_experts, z = decision.probabilities.shape[-1], []
        for b, task_type in enumerate(types.tolist()):
            mass = decision.probabilities[b][valid[b]].sum(dim=0)
            for e in range(num_experts):
                first = e < num_experts / 2
                raised = (first and task_type == 1) or (not first and task_type == 0)
                z.append(mass[e] * (1.1 if raised else 0.9))
        aux = aux + torch.stack(z).var(unbiased=True) / torch.stack(z).mean() ** 2
    return 0.1 * aux


def mixlora_aux(decisions: Sequence[Sequence[Decision]], valid: Tensor, types: Tensor) -> Tensor:
    """0.01 · E Σ f P over all layers as one; f sums to the number of chosen experts."""
    p = torch.cat([d.probabilities[valid] for layer in decisions for d in layer])
    chosen = torch.cat([d.chosen[valid] for layer in decisions for d in layer])
    return 0.01 * p.shape[-1] * (chosen.to(p.dtype).mean(dim=0) * p.mean(dim=0)).sum()


def switch_aux(decisions: Sequence[Sequence[Decision]], valid: Tensor, types: Tensor) -> Tensor:
    """The Switch loss over all layers as one, and 0.001 · the router z-loss."""
    logits = torch.cat([d.logits[valid] for layer in decisions for d in layer])
    z_loss = (logits.logsumexp(dim=-1) ** 2).mean()
    return mixlora_aux(decisions, valid, types) + 0.001 * z_loss


# ------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Method:
    """A preset of molora, the arguments that it is tested with, and what it should then be."""

    preset: str
    arguments: Mapping[str, object]
    linear: Callable[..., tuple[Tensor, Decision | None]]
    """On every targeted linear, but not those of the FFN if `ffn` is given."""
    settings: Mapping[str, float]
    """Keyword arguments of `ffn` if that is given, else of `linear`."""
    ffn: Callable[..., tuple[Tensor, Decision]] | None = None
    """On every whole FFN."""
    aux: Callable[[Sequence[Sequence[Decision]], Tensor, Tensor], Tensor] = no_aux
    """Decisions by layer, which tokens are valid and the task types → the weighted loss."""
    attention: bool = True
    """Whether attention linears are targets."""


SCALE = 2.0
SMALL = {"rank": 3, "alpha": 6.0, "dropout": 0.0}
FOUR = {**SMALL, "num_experts": 4}
METHODS: dict[str, Method] = {
    "lora": Method("lora", SMALL, linear=lora_linear, settings={"scale": SCALE}),
    "molora": Method("molora", FOUR, linear=soft_linear, settings={"scale": SCALE}),
    "mola": Method(
        "mola", SMALL, linear=mola_linear, aux=mola_aux, settings={"scale": SCALE, "k": 2}
    ),
    "loramoe": Method(
        "loramoe",
        FOUR,
        linear=soft_linear,
        aux=loramoe_aux,
        settings={"scale": SCALE},
        attention=False,
    ),
    "mixlora": Method(
        "mixlora",
        FOUR,
        linear=lora_linear,
        ffn=mixlora_ffn,
        aux=mixlora_aux,
        settings={"scale": SCALE, "k": 2},
    ),
    "mixlora_top_p": Method(
        "mixlora",
        {**FOUR, "variant": "top_p", "top_p": 0.6},
        linear=lora_linear,
        ffn=mixlora_top_p_ffn,
        aux=mixlora_aux,
        settings={"scale": SCALE, "top_p": 0.6},
    ),
    "mixlora_switch": Method(
        "mixlora",
        {**FOUR, "variant": "switch", "capacity": 2},
        linear=lora_linear,
        ffn=mixlora_switch_ffn,
        aux=switch_aux,
        settings={"scale": SCALE, "capacity": 2},
    ),
}


class Adapted:
    """A method on all its modules: what each of them computes, and what its routers decided.

    Args:
        method: which, and with what settings.
        state: experts and routers under `{path}.experts.lora_A` and so on.
        valid: (B, S) bool, False for padding.
    """

    def __init__(self, method: Method, state: Weights, valid: Tensor) -> None:
        self.method = method
        self.state = state
        self.valid = valid
        self.decisions: dict[str, Decision] = {}

    def linear(self, path: str, x: Tensor, W: Tensor) -> Tensor:
        """The output of the linear at `path`, adapted if it is a target."""
        if f"{path}.experts.lora_A" not in self.state:
            return x @ W.T
        settings = {"scale": SCALE} if self.method.ffn else self.method.settings
        y, decision = self.method.linear(x, W, self._weights(path), **settings)
        if decision is not None:
            self.decisions[path] = decision
        return y

    def ffn(self, path: str, x: Tensor, base: Weights) -> Tensor:
        """The output of the FFN at `path`; `base` holds the weights of its three linears."""
        if self.method.ffn is None:
            gate = self.linear(f"{path}.gate_proj", x, base["gate_proj"])
            up = self.linear(f"{path}.up_proj", x, base["up_proj"])
            return self.linear(f"{path}.down_proj", silu(gate) * up, base["down_proj"])
        w = {name: self._weights(f"{path}.{name}") for name in base}
        router = self.state[f"{path}.router.weight"]
        y, decision = self.method.ffn(x, base, w, router, self.valid, **self.method.settings)
        self.decisions[path] = decision
        return y

    def aux(self, task_types: Tensor) -> Tensor:
        """The weighted auxiliary loss of what was decided so far."""
        layers: dict[str, list[Decision]] = {}
        for path, decision in self.decisions.items():
            layer = re.search(r"layers\.(\d+)", path)
            layers.setdefault(layer[1] if layer else path, []).append(decision)
        return self.method.aux(list(layers.values()), self.valid, task_types)

    def _weights(self, path: str) -> Weights:
        names = {"lora_A": "experts.lora_A", "lora_B": "experts.lora_B", "router": "router.weight"}
        found = {name: self.state.get(f"{path}.{key}") for name, key in names.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

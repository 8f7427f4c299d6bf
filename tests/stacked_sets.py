"""Sets of adapters of a base's stacked weights, and what mixtures of them compute, made densely."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from frozen_sets import update
from tiny_models import batch_for, tiny
from torch import Tensor, nn
from torch.nn import functional as F

import molora

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
BOTH = {"target_modules": [], "target_parameters": [UP, DOWN]}
RAGGED: dict[str, dict[str, Any]] = {
    "math": {"r": 3, **BOTH},
    "code": {**BOTH, "r": 2, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "law": {
        "target_modules": ["q_proj"],
        "target_parameters": [DOWN],
        "rank_pattern": {r".*\.down_proj": 4},
    },
    "art": {"r": 3, "target_modules": ["o_proj"]},
}
"""Other ranks, scalings and parameters, and one of linears alone; blocks in another order."""
SAME = {
    name: {"r": 3, "lora_alpha": alpha, **BOTH}
    for name, alpha in [("math", 5), ("code", 8), ("law", 2)]
}
"""One block; scalings differ."""
Gates = Callable[[str, Tensor], Tensor]
"""(linear or parameter, what its module reads (T, in)) → (T, E)."""


def reference(
    experts: molora.FrozenExperts,
    gates: Gates,
    family: str = "mixtral",
    *,
    dtype: torch.dtype = torch.float64,
    **batch: Tensor,
) -> Tensor:
    """Logits with W + Σ_e gate_e · ΔW_e made for every token, weight by weight."""
    model = tiny(family).to(dtype)

    def linear(layer: nn.Module, inputs: Any, out: Tensor, path: str) -> Tensor:
        gates_E = gates(path, inputs[0]).to(dtype)
        for number, adapter in enumerate(experts.adapters.values()):
            if path in adapter.modules:
                out = out + gates_E[..., number, None] * update(layer, adapter, path, inputs[0])
        return out

    def stacked(module: Any, path: str, x_TH: Tensor, index_TK: Tensor, w_TK: Tensor) -> Tensor:
        def weights(name: str) -> Tensor:
            """(T, E_b, out, in)."""
            found = module.get_parameter(name).expand(len(x_TH), -1, -1, -1)
            gates_TE = gates(f"{path}.{name}", x_TH).to(dtype)
            for number, adapter in enumerate(experts.adapters.values()):
                part = adapter.parameters.get(f"{path}.{name}")
                if part is not None:
                    added = part.scaling * part.lora_B.to(dtype) @ part.lora_A.to(dtype)
                    found = found + gates_TE[:, number, None, None, None] * added
            return found

        h_TE = torch.einsum("teoi,ti->teo", weights("gate_up_proj"), x_TH)
        gate, up = h_TE.chunk(2, dim=-1)
        y_TE = torch.einsum("teoi,tei->teo", weights("down_proj"), F.silu(gate) * up)
        w_TE = w_TK.new_zeros(len(x_TH), y_TE.shape[1]).scatter(1, index_TK, w_TK)
        return (w_TE[..., None].to(dtype) * y_TE).sum(dim=1)

    for path in experts.modules:
        hook = partial(linear, path=path)
        model.get_submodule(path).register_forward_hook(hook)
    for path in dict.fromkeys(p.rpartition(".")[0] for p in experts.parameters):
        module: Any = model.get_submodule(path)
        module.forward = partial(stacked, module, path)
    return model(**(batch or batch_for(model, labels=False))).logits.float()


def same_everywhere(*values: float) -> Gates:
    return lambda path, x: torch.tensor(values).expand(*x.shape[:-1], -1)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def compose(family: str, experts: molora.FrozenExperts, router: Any, **options: Any) -> Any:
    return molora.compose(tiny(family), experts, router=router, **options)

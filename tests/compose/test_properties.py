"""Any set of experts in any mixture: each linear adds the gated sum of its experts' updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from frozen_sets import update
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problems import RUNNABLE
from tiny_models import tiny
from torch import Tensor

import molora
from molora.compose.experts import FrozenExperts
from molora.io.adapter import Adapter, AdapterModule

LINEARS = {
    "model.layers.0.self_attn.q_proj": (32, 48),
    "model.layers.0.self_attn.v_proj": (32, 24),
    "model.layers.0.mlp.up_proj": (32, 40),
    "model.layers.0.mlp.down_proj": (40, 32),
}
BASE = tiny("llama", num_hidden_layers=1)


@st.composite
def sets(draw: st.DrawFn, *, dora: bool) -> FrozenExperts:
    """One to four experts on some of the linears, of ranks up to more than these are wide."""
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    adapters = {}
    for name in ("a", "b", "c", "d")[: draw(st.integers(1, 4))]:
        form = draw(st.sampled_from(["plain", "plain", "bias", "dora" if dora else "plain"]))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        paths = draw(st.lists(st.sampled_from([*LINEARS]), min_size=1, unique=True))
        modules = {}
        for path in paths:
            wide, tall = LINEARS[path]
            rank = draw(st.sampled_from([1, 3, 3, 8, 45]))

            def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return (torch.randn(shape, generator=source) / shape[-1] ** 0.5).to(dtype)

            modules[path] = AdapterModule(
                lora_A=normal(rank, wide),
                lora_B=normal(tall, rank) * draw(st.sampled_from([0, 1, 1])),
                scaling=draw(st.sampled_from([0.5, 2.0])),
                update_norm=1.0,
                bias=normal(tall) if form == "bias" else None,
                magnitude=normal(tall).abs() * 8 if form == "dora" else None,
            )
        digest = f"{draw(st.integers(0, 2**64)):064x}"
        adapters[name] = Adapter(Path(name), modules, None, None, False, digest, ())
    return FrozenExperts(adapters, ())


def expected(
    experts: FrozenExperts, mixture: molora.Mixture, path: str, x: Tensor, missing: str
) -> Tensor:
    linear = BASE.get_submodule(path)
    gates_TE = mixture.built.sites[path].decide(x).dense_gates().double()
    there_E = torch.tensor(experts.present(path))
    if missing == "renorm":
        kept_T1 = (gates_TE * there_E).sum(1, keepdim=True)
        whole_T1 = gates_TE.sum(1, keepdim=True)
        gates_TE = torch.where(kept_T1 > 0, gates_TE / kept_T1.clamp_min(1e-30) * whole_T1, 0)
    y_TF = x.double() @ linear.weight.double().T
    for number, adapter in enumerate(experts.adapters.values()):
        if there_E[number]:
            added = update(linear.double(), adapter, path, x.double())
            y_TF = y_TF + gates_TE[:, number, None] * added
    linear.float()
    return y_TF.float()


@settings(max_examples=40)
@given(data=st.data())
def test_a_linear_adds_the_gated_updates_of_its_experts(data: st.DataObject) -> None:
    router: Any = data.draw(
        st.sampled_from(
            ["linear", "arrow", "spectr", "lag", "uniform", "hard_top1", "mole", "gate"]
        )
    )
    experts = data.draw(sets(dora=router != "mole"))
    options = {"hard_top1": {"scope": "linear"}, "lag": {"preselect": 2}}.get(router, {})
    missing = data.draw(st.sampled_from(["mask", "renorm", "zero"]))
    model = tiny("llama", num_hidden_layers=1)
    mixture = molora.compose(
        model,
        experts,
        router={"kind": router, **options},
        missing=missing,
        backend=data.draw(st.sampled_from([*RUNNABLE])),
    )
    rows = data.draw(st.sampled_from([1, 2, 33]))
    for path in mixture.built.sites:
        x = torch.randn(rows, LINEARS[path][0])
        with torch.no_grad():
            found = model.get_submodule(path)(x)
            reference = expected(experts, mixture, path, x, missing)
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=2e-4)
    state = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    mixture.load_state_dict(state)
    mixture.detach()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in BASE.named_parameters())

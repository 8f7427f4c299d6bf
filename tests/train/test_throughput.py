"""FLOPs per token against torch's own counter, peaks by name, and the time left."""

from __future__ import annotations

import time

import pytest
import torch
from tiny_models import CAUSAL, batch_for, tiny
from torch.utils.flop_counter import FlopCounterMode

import molora
from molora.config import MixtureConfig
from molora.train.throughput import Remaining, TokenFlops, duration, peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_peaks_are_known_by_the_name_of_the_device(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA A1000", "Tesla V100-SXM2-16GB", "cpu", ""])
def test_other_devices_have_no_known_peak(name: str) -> None:
    assert peak_flops(name) is None


DENSE = {"num_experts": 3, "rank": 5, "select": {"kind": "dense"}}


def counted(model: torch.nn.Module) -> float:
    """FLOPs per token of a step's matrix products, attention left out."""
    batch = batch_for(model, (24, 24, 24))
    embedded = model.get_input_embeddings()
    # as below a first adapted layer that is not the first: gradients go all the way down
    embedded.register_forward_hook(lambda *args: args[2].requires_grad_(True))
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    total = counter.get_flop_counts()["Global"]
    kept = {op: count for op, count in total.items() if op in PRODUCTS}
    return sum(kept.values()) / batch["input_ids"].numel()


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten._grouped_mm}


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["re:.*_proj"]])
def test_flops_are_those_that_torch_counts(targets: list[str]) -> None:
    # eager attention: its products are batched, and thus told apart
    model = tiny("llama", attn_implementation="eager").train()
    config = MixtureConfig.parse({"groups": [{**DENSE, "targets": targets}], "backend": "dense"})
    mixture = molora.attach(model, config)
    expected = TokenFlops(mixture).per_token({})
    assert counted(model) == pytest.approx(expected, rel=0.03)


def test_a_token_pays_for_the_experts_that_act() -> None:
    mixture = molora.attach(tiny("llama"), molora.presets.mola(num_experts=4, top_k=2, rank=3))
    flops = TokenFlops(mixture)
    sites = mixture.built.sites
    experts = sum(p.numel() for p in mixture.trainable_parameters()["experts"])
    router = sum(p.numel() for p in mixture.trainable_parameters()["router"])
    half = flops.per_token(dict.fromkeys(sites, 0.5))
    assert half == flops.base + 6 * (0.5 * experts + router)
    assert flops.per_token({}) - half == 3 * experts
    mixture.freeze("experts")
    assert flops.per_token({}) == flops.base + 4 * experts + 6 * router


def test_the_base_takes_four_flops_a_weight_and_a_trained_head_six() -> None:
    model = tiny("llama")
    linears = {n: m.weight.numel() for n, m in model.named_modules() if hasattr(m, "in_features")}
    config = MixtureConfig.parse({"groups": [DENSE], "train_modules": ["lm_head"]})
    frozen = TokenFlops(
        molora.attach(tiny("llama"), config.model_copy(update={"train_modules": ()}))
    )
    assert frozen.base == 4 * sum(linears.values())
    trained = TokenFlops(molora.attach(model, config))
    assert trained.base == frozen.base + 2 * linears["lm_head"]


@pytest.mark.parametrize("family", [*CAUSAL, "t5", "bert"])
def test_flops_are_known_where_every_token_passes_every_linear_once(family: str) -> None:
    mixture = molora.attach(tiny(family), MixtureConfig.parse({"groups": [DENSE]}))
    flops = TokenFlops(mixture)
    assert flops.known == (family not in ("t5", "mixtral", "qwen3_moe"))
    assert flops.base > 4 * 32 * 32


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (98.6, "99 s"),
        (100, "2 min"),
        (3500, "58 min"),
        (3599, "1 h 00 min"),
        (11_100, "3 h 05 min"),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_left_goes_by_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    remaining = Remaining()
    remaining.start(100)  # resumed
    now = 60.0
    assert remaining.seconds(104, 110) == pytest.approx(15.0)
    assert remaining.seconds(110, 110) == 0

"""The page docs/scaling.md, from the formulas of molora.train and benchmarks/scaling.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from scaling_text import CHECKS_HEAD, HEAD, LIMITS, TRAFFIC_FOOT, TRAFFIC_HEAD

import molora
from molora.config.run import RunConfig
from molora.train import activations
from molora.train.activations import Batch
from molora.train.deepspeed_config import deepspeed_config
from molora.train.footprint import footprint, gathered_bytes
from molora.train.shapes import Decoder, Experts, Tensors, tensors
from molora.train.traffic import Fetches, Traffic, fetched, ideal, traffic

MODELS = {
    "7 B": Decoder(4096, 11008, layers=32, heads=32, kv_heads=32, vocab=32000),
    "13 B": Decoder(5120, 13824, layers=40, heads=40, kv_heads=40, vocab=32000),
    "70 B": Decoder(8192, 28672, layers=80, heads=64, kv_heads=8, vocab=32000),
}
EXPERTS = Experts(num_experts=8, rank=8)
BATCH = Batch(rows=1, length=4096)
STATE_BATCH = Batch(rows=1, length=16)
"""Of the measurement of what is held and sent."""
GPU_BYTES = 80e9
# a single process has nothing to divide
CASES = (
    *((1, "ddp"), (1, "zero3_offload")),
    *((n, e) for n in (8, 64) for e in ("ddp", "zero1", "zero2", "zero3", "zero3_offload")),
)
NAMES = {
    "alone": "no communication",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offload",
}
# bytes/s, peaks: NVLink of an H100, one direction; the eight 400 Gb/s adapters of a node, which
# share what the rings carry out of it; one such adapter
NVLINK, EIGHT_ADAPTERS, ONE_ADAPTER = 450e9, 400e9, 50e9
FLOPS, USED = 989e12, 0.4


def zero_section(name: str, processes: int) -> dict[str, Any] | None:
    """What `train.deepspeed: NAME` becomes; None for DDP."""
    if name == "ddp":
        return None
    run = RunConfig(
        model={"name": "random"},
        data={"train": ["none.jsonl"]},
        mixture=molora.presets.mola(),
        train={"deepspeed": name},
    )
    config = deepspeed_config(run, world_size=processes)
    assert config is not None
    section: dict[str, Any] = config["zero_optimization"]
    return section


def page(measured: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [
        HEAD,
        *memory_tables(),
        TRAFFIC_HEAD,
        traffic_table(),
        TRAFFIC_FOOT,
        CHECKS_HEAD,
        *state_tables(measured["state"]),
        activation_table(measured["activations"]),
        *speed_table(measured["speed"]),
        LIMITS,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def memory_tables() -> Iterator[str]:
    for name, decoder in MODELS.items():
        sizes = tensors(decoder, EXPERTS)
        plain = activations.peak(decoder, EXPERTS, BATCH)
        recomputed = activations.peak(decoder, EXPERTS, BATCH, checkpointing=True)
        dropout = Experts(EXPERTS.num_experts, EXPERTS.rank, dropout=True)
        dropped = activations.peak(decoder, dropout, BATCH)
        yield (
            f"### {name}: {sum(sizes.frozen) / 1e9:.2f} · 10⁹ frozen, "
            f"{sum(sizes.trained) / 1e6:.0f} · 10⁶ trained\n\n"
            f"Activations: {gb(plain)} GB, or {gb(recomputed)} GB with gradient checkpointing "
            f"(with dropout {gb(dropped)} GB, since each linear then keeps a mask of "
            "its own)."
        )
        yield table(
            [
                *("GPUs", "engine", "weights", "trained", "gradients", "moments", "in passing"),
                *("sum", "with activations", "checkpointed", "fits", "host, a process"),
            ],
            (
                memory_row(sizes, processes, engine, plain, recomputed)
                for processes, engine in CASES
            ),
        )


def memory_row(
    sizes: Tensors, processes: int, engine: str, plain: int, recomputed: int
) -> Iterator[object]:
    held = footprint(sizes, processes=processes, zero=zero_section(engine, processes))
    yield from (processes, "one process" if (processes, engine) == (1, "ddp") else NAMES[engine])
    gradients = held.gradients + held.buffers
    yield from map(gb, (held.weights, held.trainables, gradients, held.moments, held.transient))
    yield from map(gb, (held.peak, held.peak + plain, held.peak + recomputed))
    if held.peak + plain <= GPU_BYTES:
        yield "yes"
    else:
        yield "checkpointed" if held.peak + recomputed <= GPU_BYTES else "no"
    yield gb(held.host) if held.host else "–"


def traffic_table() -> str:
    rows = []
    for name, decoder in MODELS.items():
        sizes = tensors(decoder, EXPERTS)
        used = compute_seconds(decoder, sizes)
        rows.append([name, "the least", *times(*(_least(sizes, n) for n in (8, 64))), ms(used)])
        for engine in ("ddp", "zero1", "zero2", "zero3"):
            found = [_sent(decoder, sizes, engine, n, False).total for n in (8, 64)]
            rows.append([name, NAMES[engine], *times(*found), ""])
        found = [_sent(decoder, sizes, "zero3", n, True).total for n in (8, 64)]
        rows.append([name, "ZeRO-3, checkpointed", *times(*found), ""])
    head = ["base", "engine", "8 GPUs, GB", "NVLink, ms", "64 GPUs, GB", "8 adapters, ms"]
    return table([*head, "1 adapter, ms", "compute, ms"], rows)


def _least(sizes: Tensors, processes: int) -> float:
    return ideal(sizes, processes=processes)


def times(eight: float, many: float) -> list[str]:
    """Bytes of 8 and of 64 processes, each with how long they take."""
    seconds = (many / EIGHT_ADAPTERS, many / ONE_ADAPTER)
    return [gb(eight), ms(eight / NVLINK), gb(many), *map(ms, seconds)]


def compute_seconds(decoder: Decoder, sizes: Tensors) -> float:
    """4 FLOPs a frozen weight and token, 6 a trained one; the embeddings are looked up."""
    multiplied = sum(sizes.frozen) - decoder.vocab * decoder.hidden
    flops = (4 * multiplied + 6 * sum(sizes.trained)) * BATCH.tokens
    return flops / (FLOPS * USED)


def _sent(
    decoder: Decoder, sizes: Tensors, engine: str, processes: int, checkpointing: bool
) -> Traffic:
    zero = zero_section(engine, processes)
    fetches: Fetches | None = None
    if zero is not None and zero["stage"] == 3:
        fetches = fetched(decoder, EXPERTS, zero=zero, checkpointing=checkpointing)
    return traffic(sizes, processes=processes, zero=zero, fetches=fetches)


def state_tables(measured: Mapping[str, Any]) -> Iterator[str]:
    decoder, processes = Decoder(**measured["decoder"]), measured["processes"]
    sizes = tensors(decoder, EXPERTS)
    yield (
        f"**Held and sent.** A base of {sum(sizes.frozen) / 1e6:,.0f} · 10⁶ weights in bfloat16 "
        f"(shape of TinyLlama) with {sum(sizes.trained) / 1e6:.1f} · 10⁶ trainables, "
        f"{processes} processes, {made_by(measured)}. Bytes are those of all tensors of one "
        "process in MB (10⁶ bytes), the host's with offload; resident memory is what the process "
        "grew by, which includes what its allocator keeps. The largest moment of a step has a "
        "bound, with activations; beyond it gloo, unlike NCCL, gathers through copies of its own, "
        "which is why ZeRO-3 exceeds it."
    )
    rows = []
    for found in measured["engines"]:
        held = footprint(sizes, processes=processes, zero=found["zero"])
        formula = held.held + held.host
        bound = held.peak + held.host + activations.peak(decoder, EXPERTS, STATE_BATCH)
        rows.append(
            [
                NAMES[found["engine"]],
                *(mb(formula), mb(found["held"]), off(formula, found["held"])),
                *(mb(found["rss_held"]), off(formula, found["rss_held"])),
                *(mb(bound), mb(found["peak"])),
            ]
        )
    head = ["engine", "before the update: formula", "tensors", "deviation"]
    head += ["resident memory", "deviation", "largest: bound", "tensors and activations"]
    yield table(head, rows)
    rows = []
    for found in measured["engines"]:
        sent = _sent(decoder, sizes, found["engine"], processes, False).total
        least = ideal(sizes, processes=processes)
        rows.append(
            [
                NAMES[found["engine"]],
                *(mb(sent), mb(found["sent"]), off(sent, found["sent"])),
                f"{found['sent'] / least:.2f} ×",
            ]
        )
    least = mb(ideal(sizes, processes=processes))
    yield (
        f"Sent by one process in one step, from DeepSpeed's communication logger and for DDP from "
        f"its buckets; the least is {least} MB:"
    )
    yield table(["engine", "formula", "measured", "deviation", "÷ the least"], rows)
    whole = next(e for e in measured["engines"] if e["engine"] == "zero3")
    bound = gathered_bytes(sizes, whole["zero"])
    yield (
        f"ZeRO-3 held at most {mb(whole['gathered'])} MB gathered; the bound is {mb(bound)} MB. "
        "This base is smaller than `stage3_max_live_parameters`, so everything is fetched once a "
        "step. tests/benchmarks/test_scaling.py checks the larger case on settings that are "
        "scaled down."
    )


def activation_table(measured: Mapping[str, Any]) -> str:
    tokens = measured["tokens"]
    rows = []
    for case in measured["cases"]:
        decoder = Decoder(**case["decoder"])
        itemsize = {"bfloat16": 2, "float32": 4}[case["dtype"]]
        batch = Batch(2, tokens // 2, itemsize=itemsize)
        how = {"checkpointing": case["checkpointing"]}
        saved = activations.saved(decoder, EXPERTS, batch, **how)
        peak = activations.peak(decoder, EXPERTS, batch, **how)
        rows.append(
            [
                f"{decoder.vocab:,}",
                case["dtype"],
                "yes" if case["checkpointing"] else "no",
                *(mb(saved), mb(case["saved"]), off(saved, case["saved"])),
                *(mb(peak), mb(case["peak"]), off(peak, case["peak"])),
            ]
        )
    head = ["vocabulary", "dtype", "checkpointing", "saved: formula", "measured", "deviation"]
    made = table([*head, "largest: formula", "measured", "deviation"], rows)
    return (
        f"**Activations.** Layers of the same shape ({measured['layers']} of them), 2 rows of "
        f"{tokens // 2} tokens, {made_by(measured)}. Saved is what saved_tensors_hooks sees, the "
        f"largest what the allocator had given out, in MB:\n\n{made}"
    )


def speed_table(measured: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"**Speed.** Hidden {measured['hidden']}, 4 layers, float32, "
        f"{measured['trainables'] / 1e6:.2f} · 10⁶ trainables, {measured['tokens']} tokens a "
        f"process and step (weak scaling), one thread a process, {made_by(measured)}. Medians of "
        f"{measured['repeats']} launches of each, in turn, of {measured['steps']} steps; in the "
        f"second before a launch the cores were at most {max(measured['busy'])} % busy. “No "
        "communication” is two processes that do not know of each other: all that two cores with "
        "one memory can give."
    )
    rows = [
        [
            NAMES[found["engine"]],
            *(f"{found['one']:,}", f"{found['two']:,}", f"{found['ratio']:.2f} ×"),
            f"{min(found['ratios']):.2f}–{max(found['ratios']):.2f}",
        ]
        for found in measured["engines"]
    ]
    head = ["engine", "1 process, tokens/s", "2 processes", "ratio", "of the launches"]
    yield table(head, rows)


def made_by(measured: Mapping[str, Any]) -> str:
    about = measured["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"`{about['command']}` on {about['machine']}, {about['date']}, {versions}"


def table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def gb(size: float) -> str:
    """In 10⁹ bytes."""
    giga = size / 1e9
    return f"{giga:.0f}" if giga >= 100 else f"{giga:.1f}" if giga >= 10 else f"{giga:.2f}"


def mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def ms(seconds: float) -> str:
    found = seconds * 1e3
    return f"{found:,.0f}" if found >= 10 else f"{found:.1f}"


def off(formula: float, found: float) -> str:
    """How far a formula is from what was found."""
    return f"{formula / found - 1:+.2%}"

"""How training scales: speed on two processes, bytes held and sent per engine, and the page
docs/scaling.md, which says from formulas that these figures check what larger models need.

Each command but the last measures, and keeps what it found in benchmarks/scaling.json:

    python benchmarks/scaling.py speed          # tokens/s on 1 and 2 processes of one thread each
    python benchmarks/scaling.py state          # bytes that every engine holds and sends
    python benchmarks/scaling.py activations    # bytes that autograd keeps
    python benchmarks/scaling.py docs           # writes docs/scaling.md

Processes talk through gloo on this machine. Models have random weights; the mixture is top-2 of 8
experts of rank 8 at all seven projections, without dropout and auxiliary losses.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

# a spinning OpenMP thread slows every other process, and with it the measurement
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch
from allocations import most_allocated
from scaling_page import EXPERTS, STATE_BATCH, page
from step_cost import saved_bytes
from transformers import AutoModelForCausalLM, LlamaConfig

import molora
from molora.train.activations import Batch
from molora.train.shapes import Decoder

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "scaling.json"
PAGE = HERE.parent / "docs" / "scaling.md"
SPEED_ENGINES = ("alone", "ddp", "zero1", "zero2", "zero3")
STATE_ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
# shape of TinyLlama-1.1B, on which these experts have 53.6 M parameters
MEDIUM = Decoder(2048, 5632, layers=22, heads=32, kv_heads=4, vocab=32000)


def small(hidden: int) -> Decoder:
    """The model of step_cost.py."""
    heads = max(1, hidden // 64)
    return Decoder(hidden, int(hidden * 2.75) // 64 * 64, 4, heads, heads, vocab=2048)


def llama(decoder: Decoder) -> dict[str, int]:
    """Its LlamaConfig."""
    return {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab,
    }


def launch(job: Mapping[str, Any], *, processes: int, timeout: float = 900) -> list[dict[str, Any]]:
    """Run scaling_ranks.py on so many processes of one thread each; an object per engine."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "job.json"), Path(folder, "found.json")
        given.write_text(json.dumps(job))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", str(HERE / "scaling_ranks.py")),
            *(str(given), str(found)),
        ]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=one_thread, capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
        results: list[dict[str, Any]] = json.loads(found.read_text())
        return results


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of every engine on 1 and on 2 processes, launches of both in turn."""
    decoder = small(args.hidden)
    job = {
        "what": "speed",
        "engines": args.engines,
        "llama": llama(decoder),
        "rows": 4,
        "length": args.tokens // 4,
        "steps": args.steps,
        "zero": json.loads(args.zero),
    }
    rates: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in args.engines}
    busy = []
    for repeat in range(args.repeats):
        for processes in (1, 2) if repeat % 2 == 0 else (2, 1):
            # the load average would count the launch before
            busy.append(psutil.cpu_percent(interval=1))
            for result in launch(job, processes=processes):
                name, seconds = result["engine"], statistics.median(result["seconds"])
                rates[name][processes].append(processes * args.tokens / seconds)
    return {
        "hidden": args.hidden,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "steps": args.steps,
        "busy": busy,
        "trainables": sum(EXPERTS.weights(decoder)),
        "engines": [summary(name, rates[name]) for name in args.engines],
    }


def summary(name: str, rates: Mapping[int, Sequence[float]]) -> dict:
    """Medians over the repeats."""
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "engine": name,
        "one": round(statistics.median(rates[1])),
        "two": round(statistics.median(rates[2])),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def sent(operations: Mapping[str, Sequence[Sequence[float]]], *, processes: int) -> float:
    """Bytes that a process sends for these, if each is a ring.

    Raises:
        ValueError: an operation that moves data and is not known.
    """
    others = (processes - 1) / processes
    share = {
        "all_reduce": 2 * others,
        "reduce": others,
        "reduce_scatter_tensor": others,
        # named by what one process gives
        "all_gather_into_tensor": processes - 1,
        "barrier": 0,
    }
    unknown = operations.keys() - share.keys()
    if unknown:
        raise ValueError(f"operations {sorted(unknown)} are not known; give their share in `sent`.")
    return sum(
        share[name] * size * count for name, sizes in operations.items() for size, count, _ in sizes
    )


def state(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes held and sent, each engine in processes of its own, whose memory nobody used before."""
    decoder = small(args.hidden) if args.hidden else MEDIUM
    engines = []
    for name in args.engines:
        job = {
            "what": "state",
            "engines": [name],
            "llama": llama(decoder),
            "dtype": "bfloat16",
            "rows": STATE_BATCH.rows,
            "length": STATE_BATCH.length,
        }
        (result,) = launch(job, processes=2)
        engines.append({**result, "sent": sent(result["operations"], processes=2)})
    return {"decoder": vars(decoder), "processes": 2, "engines": engines}


def activations(args: argparse.Namespace) -> dict[str, Any]:
    """Saved and largest bytes of forward and backward in this process."""
    torch.set_num_threads(1)
    cases = []
    for vocab, dtype, checkpointing in itertools.product(
        (2048, 32000), ("bfloat16", "float32"), (False, True)
    ):
        decoder = replace(MEDIUM, layers=args.layers, vocab=vocab)
        itemsize = getattr(torch, dtype).itemsize
        batch = Batch(2, args.tokens // 2, itemsize=itemsize)
        found = kept(decoder, batch, dtype=dtype, checkpointing=checkpointing)
        case = {"decoder": vars(decoder), "dtype": dtype, "checkpointing": checkpointing}
        cases.append({**case, **found})
    return {"layers": args.layers, "tokens": args.tokens, "cases": cases}


def kept(decoder: Decoder, batch: Batch, *, dtype: str, checkpointing: bool) -> dict[str, int]:
    """Bytes of distinct storages that autograd saves, and most bytes that a step allocates beside
    weights and gradients of trainables."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**llama(decoder)), dtype=getattr(torch, dtype)
    )
    mola = molora.presets.mola(
        num_experts=EXPERTS.num_experts,
        rank=EXPERTS.rank,
        top_k=EXPERTS.top_k,
        dropout=0.0,
        losses=(),
        backend="dense",
    )
    molora.attach(model.train(), mola)
    if checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": molora.checkpoint_context}
        )
    ids_BS = torch.randint(0, decoder.vocab, (batch.rows, batch.length))

    def forward() -> torch.Tensor:
        return model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    saved = saved_bytes(forward)
    gc.collect()
    return {"saved": saved, "peak": most_allocated(lambda: forward().backward())}


def record(name: str, found: Mapping[str, Any]) -> None:
    """Keep a measurement, with the command that made it, in MEASURED."""
    kept_before = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    about = {
        "command": shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
    }
    everything = {**kept_before, name: {"about": about, **found}}
    MEASURED.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{os.cpu_count()} cores of {model or platform.machine()}"


def page_text(measured: Path = MEASURED) -> str:
    """docs/scaling.md."""
    return page(json.loads(measured.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed")
    one.add_argument("--engines", nargs="+", default=list(SPEED_ENGINES))
    one.add_argument("--hidden", type=int, default=512)
    one.add_argument("--tokens", type=int, default=1024, help="per process and step")
    one.add_argument("--steps", type=int, default=10)
    one.add_argument("--repeats", type=int, default=5)
    one.add_argument("--zero", default="{}", help="JSON of changes to zero_optimization")
    two = commands.add_parser("state")
    two.add_argument("--engines", nargs="+", default=list(STATE_ENGINES))
    two.add_argument("--hidden", type=int, help="of a small model; a 1.1 B one if not given")
    three = commands.add_parser("activations")
    three.add_argument("--layers", type=int, default=2)
    three.add_argument("--tokens", type=int, default=1024)
    commands.add_parser("docs")
    for command in (one, two, three):
        command.add_argument("--print", action="store_true", help="and keep nothing")
    args = parser.parse_args()
    if args.command == "docs":
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page_text(), encoding="utf-8")
        return
    found = {"speed": speed, "state": state, "activations": activations}[args.command](args)
    if args.print:
        print(json.dumps(found, indent=1))
    else:
        record(args.command, found)


if __name__ == "__main__":
    main()

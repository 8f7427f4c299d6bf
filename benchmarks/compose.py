"""What a set of pretrained experts costs, beside package peft's routers over the same adapters.

A Llama of random weights with random LoRA adapters of rank 8 on all seven projections. Figures, all
medians of ratios of two runs right beside each other, one thread:

    forward   no gradients, in evaluation: time / base, and peft's time / ours
    step      forward and backward, as router training makes them: time / base's
    decode    128 tokens after a prompt of 128: peft's time / ours (peft's X-LoRA keeps no cache)

    python benchmarks/compose.py                                   # all, 8, 64 and 256 experts
    python benchmarks/compose.py forward --experts 64 --runs 9
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# a spinning OpenMP thread slows every other process, and with it the measurement
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from step_cost import PROJECTIONS, RANK, Sizes, Step, base_model, frozen
from torch import Tensor, nn

import molora

TOP_K = 4
Build = Callable[[Sizes, list[Path]], nn.Module]
"""Sizes and the adapters' directories → a model with a router over them."""


@dataclass(frozen=True)
class Cost:
    """One comparison; see the module's docstring.

    Attributes:
        peft_x: peft's time / ours; None where peft has no such router.
    """

    figure: str
    name: str
    experts: int
    hidden: int
    base_x: float
    peft_x: float | None
    milliseconds: float


def write_adapters(directory: Path, number: int, sizes: Sizes) -> list[Path]:
    """Random adapters that package peft saved."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=PROJECTIONS)
    model = get_peft_model(base_model(sizes), config)
    found = []
    for expert in range(number):
        source = torch.Generator().manual_seed(expert)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.02, generator=source)
        found.append(directory / f"expert_{expert}")
        model.save_pretrained(found[-1])
    return found


def composed(**router: object) -> Build:
    """molora's router over the adapters."""

    def build(sizes: Sizes, adapters: list[Path]) -> nn.Module:
        model = base_model(sizes).eval()
        experts = molora.load_experts({path.name: path for path in adapters})
        molora.compose(model, experts, router=router)
        return model

    return build


def peft_arrow(sizes: Sizes, adapters: list[Path]) -> nn.Module:
    """Package peft's Arrow."""
    from peft import ArrowConfig, create_arrow_model

    model = base_model(sizes).eval()
    paths = [str(path) for path in adapters]
    made: nn.Module = create_arrow_model(model, paths, ArrowConfig(top_k=TOP_K)).eval()
    return made


def peft_xlora(sizes: Sizes, adapters: list[Path]) -> nn.Module:
    """Package peft's X-LoRA."""
    from peft import XLoraConfig, get_peft_model

    model = base_model(sizes).eval()
    model.config.use_cache = False
    paths = {str(number): str(path) for number, path in enumerate(adapters)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=sizes.hidden, adapters=paths)
    return get_peft_model(model, config).eval()


ROUTERS: dict[str, tuple[Build, Build | None]] = {
    "arrow": (composed(kind="arrow", top_k=TOP_K), peft_arrow),
    "xlora": (composed(kind="xlora"), peft_xlora),
    "spectr": (composed(kind="spectr", top_k=TOP_K), None),
    "lag": (composed(kind="lag", top_k=TOP_K), None),
    "uniform": (composed(kind="uniform"), None),
}
"""Name → ours, and package peft's."""


def forward(model: nn.Module, ids_BS: Tensor) -> Callable[[], object]:
    """A forward without gradients and without a cache."""

    @torch.no_grad()
    def run() -> object:
        return model(input_ids=ids_BS, use_cache=False)

    return run


def step(model: nn.Module, ids_BS: Tensor) -> Callable[[], object]:
    """A step of training."""
    model.train()
    return Step(model, ids_BS)


def decode(prompt: int, new_tokens: int) -> Callable[[nn.Module, Tensor], Callable[[], object]]:
    """Generation of so many tokens after a prompt."""

    def make(model: nn.Module, ids_BS: Tensor) -> Callable[[], object]:
        prompt_BS = ids_BS[:1, :prompt]

        def run() -> object:
            with torch.no_grad():
                return model.generate(
                    input_ids=prompt_BS,
                    attention_mask=torch.ones_like(prompt_BS),
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )

        return run

    return make


def measure(
    figure: str,
    names: list[str],
    experts: int,
    sizes: Sizes,
    *,
    runs: int,
    prompt: int = 128,
    new_tokens: int = 128,
) -> Iterator[Cost]:
    """Base, ours and peft's interleaved in one process."""
    make = {"forward": forward, "step": step, "decode": decode(prompt, new_tokens)}[figure]
    source = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, sizes.vocab, (4, sizes.tokens // 4), generator=source)
    base = frozen(sizes) if figure == "step" else base_model(sizes).eval()
    run_base = make(base, ids_BS)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = write_adapters(Path(scratch), experts, sizes)
        for name in names:
            ours, theirs = ROUTERS[name]
            run_ours = make(ours(sizes, adapters), ids_BS)
            run_peft = None if theirs is None else make(theirs(sizes, adapters), ids_BS)
            yield _compared(figure, name, experts, sizes, runs, (run_base, run_ours, run_peft))


def _compared(
    figure: str,
    name: str,
    experts: int,
    sizes: Sizes,
    runs: int,
    calls: tuple[Callable[[], object], Callable[[], object], Callable[[], object] | None],
) -> Cost:
    times = []
    for number in range(runs + 1):
        base, ours, theirs = (None if call is None else _seconds(call) for call in calls)
        assert base is not None
        assert ours is not None
        if number:  # the first run makes caches and plans
            times.append((base, ours, theirs))
    ratios = [theirs / ours for _, ours, theirs in times if theirs is not None]
    return Cost(
        figure,
        name,
        experts,
        sizes.hidden,
        base_x=round(statistics.median(ours / base for base, ours, _ in times), 3),
        peft_x=round(statistics.median(ratios), 2) if ratios else None,
        milliseconds=round(statistics.median(ours for _, ours, _ in times) * 1e3, 2),
    )


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    figures = {"forward": list(ROUTERS), "step": ["xlora"], "decode": ["arrow", "xlora"]}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(figures)}; all by default")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--routers", nargs="+", choices=list(ROUTERS))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128, help="tokens before those decoded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    unknown = [name for name in args.figures if name not in figures]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(figures)}")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    sizes = Sizes(hidden=args.hidden, layers=args.layers, tokens=args.tokens)
    for figure in args.figures or list(figures):
        for experts in args.experts:
            names = [n for n in figures[figure] if args.routers is None or n in args.routers]
            counts = {"runs": args.runs, "prompt": args.prompt}
            for cost in measure(figure, names, experts, sizes, **counts):
                print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main()

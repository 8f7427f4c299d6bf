"""What the Triton kernels need of a GPU, by formula and from their binaries: docs/kernels.md.

    python benchmarks/kernels.py compile    # reads the binaries, keeps benchmarks/kernels.json
    python benchmarks/kernels.py docs       # writes docs/kernels.md

Neither needs a GPU, and nothing here was measured on one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from kernels_compiled import TARGETS, Case, launches_of, needs
from kernels_page import page

ROOT = Path(__file__).parents[1]
BINARIES = ROOT / "benchmarks" / "kernels.json"
PAGE = ROOT / "docs" / "kernels.md"
CASES = [
    Case(op, torch.bfloat16, experts, rank)
    for op in ("lora_mix", "lora_rows")
    for experts, rank in ((8, 8), (8, 16), (64, 8), (64, 16))
]


def binaries() -> dict[str, Any]:
    """Every launch of CASES on every target, with what its binary needs."""
    rows = []
    for name, target in TARGETS.items():
        for number, case in enumerate(CASES):
            for launch in launches_of(case, target):
                found = asdict(needs(launch, target))
                a = launch.arguments
                about = {
                    "sorted": a["SORTED"],
                    "weighted": a["WEIGHTED"],
                    "add": a.get("ADD", False),
                    "tile": [a["BLOCK_M"], a["BLOCK_P"], a["BLOCK_D"]],
                }
                rows.append(
                    {"target": name, "case": number, "program": launch.program, **about, **found}
                )
    return {"triton": triton.__version__, "cases": [str(case) for case in CASES], "rows": rows}


def page_text(kept: Path = BINARIES) -> str:
    """docs/kernels.md."""
    return page(json.loads(kept.read_text(encoding="utf-8")), CASES)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["compile", "docs"])
    if parser.parse_args().command == "compile":
        BINARIES.write_text(json.dumps(binaries()) + "\n", encoding="utf-8")
        return
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page_text(), encoding="utf-8")


if __name__ == "__main__":
    main()

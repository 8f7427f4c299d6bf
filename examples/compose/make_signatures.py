"""Makes ``signature/`` beside this file: ``python -m examples.compose.make_signatures``.

A row asks for the signature of a function of the standard library, described by the first line of
its docstring. The modules are those of ``examples/data/python_module``, so that its LICENSES.md
speaks of these texts too. Same inputs, same files; needs Python 3.11, whose library it reads.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = ("asyncio", "decimal", "email", "http", "logging", "unittest", "xml")
ROWS = {"train": 250, "test": 100}
LONGEST = 70
"""Characters of a signature."""


def signatures(library: Path) -> Iterator[tuple[str, str, str]]:
    """(name, first line of the docstring, signature) of documented functions."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0].removeprefix("_py") not in MODULES or "test" in parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                signature = f"def {node.name}({ast.unparse(node.args)})"
                fits = len(line.split()) >= 4 and len(signature) <= LONGEST
                if fits and not node.name.startswith("__"):
                    yield node.name, line, signature


def rows(library: Path) -> dict[str, list[dict[str, str]]]:
    """Splits that share neither a description nor a function's name."""
    names: set[str] = set()
    texts: set[str] = set()
    chosen = []
    for name, line, signature in signatures(library):
        letters = re.sub(r"\W+", "", line.lower())
        if name not in names and letters not in texts:
            names.add(name)
            texts.add(letters)
            prompt = f'Which Python function is described as "{line}"?'
            chosen.append({"prompt": prompt, "completion": signature, "task": "signature"})
    random.Random(0).shuffle(chosen)
    test = ROWS["train"] + ROWS["test"]
    return {"train": chosen[: ROWS["train"]], "test": chosen[ROWS["train"] : test]}


def main(directory: Path = HERE / "signature") -> None:
    """Write both files."""
    if sys.version_info[:2] != (3, 11):
        raise SystemExit("the task is made from the standard library of Python 3.11; run that")
    directory.mkdir(exist_ok=True)
    for split, found in rows(Path(sysconfig.get_path("stdlib"))).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

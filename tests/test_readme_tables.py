"""The README's tables say what the code says."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import molora
from molora.kernels import BACKENDS

README = Path(__file__).parents[1] / "README.md"


def table(marker: str) -> dict[str, str]:
    """The rows of the table below a marker: first cell without backticks → second cell."""
    text = README.read_text(encoding="utf-8").partition(f"<!-- {marker}:")[2]
    rows = [line for line in text.partition("\n")[2].split("\n\n")[0].splitlines() if "|" in line]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    return {name.strip("`"): meaning for name, meaning in cells}


def test_methods_table_is_what_methods_returns() -> None:
    assert table("methods") == molora.methods()


def test_backends_table_is_the_backend_table() -> None:
    documented = table("backends")
    assert set(documented) == set(BACKENDS)
    for name, text in documented.items():
        # no module may have the library's own name
        module = import_module(f"molora.kernels.lora_mix.{name.replace('triton', 'triton_mix')}")
        assert text == (module.__doc__ or "").splitlines()[0]

"""docs/compose.md says what the code says."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from molora.presets.frozen import ROUTERS

PAGE = Path(__file__).parents[1] / "docs" / "compose.md"


def router_rows() -> list[str]:
    """A row per router: its name, and the first paragraph of its docstring."""
    first = {name: (recipe.__doc__ or "").partition("\n\n")[0] for name, recipe in ROUTERS.items()}
    joined = {name: " ".join(text.split()).replace("|", r"\|") for name, text in first.items()}
    return [f"| `{name}` | {text} |" for name, text in joined.items()]


def test_the_table_of_routers_is_theirs() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("<!-- routers:")[2]
    rows = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("|")]
    assert rows[2:] == router_rows()


def test_every_function_and_module_that_is_named_exists() -> None:
    named = set(re.findall(r"`(molora(?:\.\w+)+)", PAGE.read_text(encoding="utf-8")))
    assert len(named) > 10
    for path in named:
        module, _, name = path.rpartition(".")
        assert is_module(path) or hasattr(import_module(module), name), path


def is_module(path: str) -> bool:
    try:
        import_module(path)
    except ModuleNotFoundError:
        return False
    return True

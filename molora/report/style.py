"""How all figures look: colours that colour-blind readers and grey printers tell apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.errors import MoLoRAError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, without yellow, which white paper swallows
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (3, 1)))
"""A line style beside each colour: colour is never the only difference."""
COLOUR_MAP = "YlGnBu"
"""ColorBrewer's: safe for colour-blind readers; ever darker, so that a grey copy reads the same."""
DPI = 160
SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
LONGEST_NAME = 24


def save(draw: Callable[[], Figure], path: str | Path) -> Path:
    """Draw with the settings above and write a PNG.

    Raises:
        MoLoRAError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MoLoRAError("figures need matplotlib. Run pip install 'molora[viz]'.") from None

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(SETTINGS):
        draw().savefig(path, dpi=DPI, format="png", facecolor="white")
    return path


def short(name: str) -> str:
    """A name that fits over a panel; control characters, which no font has, become spaces."""
    plain = "".join(character if character.isprintable() else " " for character in name)
    return plain if len(plain) <= LONGEST_NAME else f"{plain[: LONGEST_NAME - 1]}…"


def colour(index: int) -> str:
    """Of the index-th line; repeats after seven."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> Any:
    """Of the index-th line; repeats after five: with the colour, a line repeats after 35."""
    return DASHES[index % len(DASHES)]

"""What experts that others trained are, in lines for the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from molora.cli.inspect import aligned

if TYPE_CHECKING:
    from molora.compose import FrozenExperts
    from molora.config import Group, Imported, MixtureConfig
    from molora.io.adapter import AdapterModule, ExpertParameter

# Names in adapters are untrusted text: nothing in them may steer the terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
HASH_DIGITS = 12


def read_table(experts: FrozenExperts) -> list[str]:
    """A line for each expert that was read: ranks, linears, and the size of its whole update."""
    rows: list[tuple[str, ...]] = [("expert", "rank", "linears", "‖ΔW‖", "base")]
    for name, adapter in experts.adapters.items():
        parts: list[AdapterModule | ExpertParameter]
        parts = [*adapter.modules.values(), *adapter.parameters.values()]
        norm = math.sqrt(sum(part.update_norm**2 for part in parts))
        ranks = span([part.rank for part in parts])
        rows.append((name, ranks, str(len(parts)), f"{norm:.3g}", _base(adapter.base)))
    return aligned(rows)


def saved_table(config: MixtureConfig) -> list[str]:
    """A line for each expert of a saved mixture, with where it came from; none if its experts are
    not of this kind."""
    rows: list[tuple[str, ...]] = []
    for form in imported(config):
        for expert in form.experts:
            ranks, scalings = zip(*expert.modules.values(), strict=True)
            parts: list[str] = [expert.dtype if not expert.trainable else config.dtype]
            parts += ["trained" if expert.trainable else "frozen"]
            parts += ["bias"] if expert.has_bias else []
            parts += ["DoRA"] if expert.has_magnitude else []
            origin = "new" if expert.sha256 is None else expert.sha256[:HASH_DIGITS]
            row = (expert.name, span(ranks), span(scalings), str(len(expert.modules)))
            rows.append((*row, ", ".join(parts), origin, _base(expert.base, expert.revision)))
    heads = ("expert", "rank", "scaling", "linears", "stored", "sha256", "base")
    return aligned([heads, *rows]) if rows else []


def routing_lines(config: MixtureConfig) -> list[str]:
    """How experts that others trained are chosen, and what happens where one is missing."""
    lines = []
    for group in config.groups:
        for form in imported_of(group):
            decided = [
                shown_settings(group.router),
                shown_settings(group.score),
                shown_settings(group.select),
            ]
            scope = getattr(group.site, "scope", group.site.kind)
            lines.append(f"router   {', '.join(decided)}; a decision for every {scope}")
            lines.append(f"missing  {form.missing}: {_MISSING[form.missing]}")
    return lines


_MISSING = {
    "mask": "an expert cannot be chosen at a linear that it does not adapt",
    "renorm": "the gates of the others grow where an expert does not adapt the linear",
    "zero": "the gate of an expert is lost where it does not adapt the linear",
}


def imported(config: MixtureConfig) -> list[Imported]:
    """The forms of imported experts, one for each group that has them."""
    return [form for group in config.groups for form in imported_of(group)]


def imported_of(group: Group) -> list[Imported]:
    """The group's form, if it is of imported experts."""
    from molora.config import Imported

    return [group.expert] if isinstance(group.expert, Imported) else []


def span(values: Sequence[float]) -> str:
    """`8`, or `4–16` of several numbers."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def harmless(text: str) -> str:
    """Text without characters that steer a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _base(name: str | None, revision: str | None = None) -> str:
    if name is None:
        return "-"
    return harmless(name[:200] if revision is None else f"{name[:200]}@{revision[:80]}")


def shown_settings(part: Any) -> str:
    """`top_k (k 3)`: a kind and what of it is not as by default."""
    shown = []
    for name in type(part).model_fields:
        value = getattr(part, name)
        if name == "kind" or value == type(part).model_fields[name].default:
            continue
        value = getattr(value, "value", value)
        value = ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
        shown.append(f"{name} {value}")
    return f"{part.kind} ({'; '.join(shown)})" if shown else str(part.kind)

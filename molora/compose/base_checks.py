"""Whether frozen experts belong to a base, as far as names and norms tell: lines for its user.

Nothing here decides; a base may be renamed, and an update may be meant to be large. Sizes that do
not fit are errors where experts are attached.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType

from molora.compose.experts import OUTLIER, FrozenExperts
from molora.errors import ConfigError
from molora.io.peft_keys import examples

LARGE = 1.0
"""‖ΔW‖ / ‖W‖ of an update that outweighs what it updates; trained ones have 0.01 to 0.3."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


def other_bases(
    experts: FrozenExperts, *, name: str | None, revision: str | None = None
) -> tuple[str, ...]:
    """One line for each other base or revision that experts say they were trained on.

    Two names are of one base if they are the same, or if one of them is a path and their last parts
    are the same: a copy keeps the name of its directory. Capitals do not count, as on the hub.
    Revisions of one base differ if both are given, and both are commits or both are names.

    Args:
        experts: what they say is `base_model_name_or_path` and `revision`.
        name: of the base, as it was loaded: an id of the hub or a path; None says nothing.
        revision: of the base; None says nothing.
    """
    found: dict[str, list[str]] = {}
    for expert, adapter in experts.adapters.items():
        if not name or not adapter.base:
            continue
        stated = ascii(adapter.base)[:200]
        if not _same_name(adapter.base, name):
            line = f"trained on {stated}, but the base is {ascii(name)[:200]}"
        elif _other_revision(adapter.revision, revision):
            line = (
                f"trained on revision {ascii(adapter.revision)[:80]} of {stated}, but the base is "
                f"revision {ascii(revision)[:80]}"
            )
        else:
            continue
        found.setdefault(line, []).append(expert)
    return tuple(f"{examples(names)}: {line}" for line, names in found.items())


def _same_name(one: str, other: str) -> bool:
    one, other = (name.strip().rstrip("/\\").lower() for name in (one, other))
    if one == other:
        return True
    if HUB_ID.fullmatch(one) and HUB_ID.fullmatch(other):
        return False
    return re.split(r"[/\\]", one)[-1] == re.split(r"[/\\]", other)[-1]


def _other_revision(one: str | None, other: str | None) -> bool:
    if not one or not other or one == other:
        return False
    return bool(COMMIT.fullmatch(one)) == bool(COMMIT.fullmatch(other))


@dataclass(frozen=True)
class RelativeNorms:
    """How large updates are.

    Attributes:
        ratios: expert → module or parameter → ‖ΔW‖ / ‖W‖ in the Frobenius norm.
        notes: experts whose updates stand out; each starts with the names it is about.
    """

    ratios: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]


def relative_norms(experts: FrozenExperts, base_norms: Mapping[str, float]) -> RelativeNorms:
    """‖ΔW‖ / ‖W‖ of every update, and which stand out: an adapter that was scaled up, by mistake or
    on purpose, draws every token in a router that goes by norms.

    A note names experts with an update larger than `LARGE` times its weight, and experts whose
    median over their modules is `OUTLIER` times as large as the median of the others' medians;
    unlike the norms alone this compares two experts, and such as adapt other modules.

    Args:
        experts: with `update_norm` of each module and parameter.
        base_norms: ‖W‖ of the weight of each of them; more are allowed.

    Raises:
        ConfigError: a module without a norm, or norms that are none.
    """
    ratios: dict[str, Mapping[str, float]] = {}
    for expert, adapter in experts.adapters.items():
        norms = {path: part.update_norm for path, part in adapter.modules.items()}
        norms |= {path: part.update_norm for path, part in adapter.parameters.items()}
        lacking = [path for path in norms if path not in base_norms]
        if lacking:
            raise ConfigError(f"base_norms lack {examples(lacking)}, which {expert} adapts.")
        wrong = [p for p in norms if not (math.isfinite(base_norms[p]) and base_norms[p] >= 0)]
        if wrong:
            raise ConfigError(f"base_norms of {examples(wrong)} are no norms.")
        ratios[expert] = MappingProxyType(
            {path: _ratio(norm, base_norms[path]) for path, norm in norms.items()}
        )
    return RelativeNorms(MappingProxyType(ratios), (*_larger(ratios), *_standing_out(ratios)))


def _ratio(norm: float, base: float) -> float:
    """Infinite for an update of a weight that is zero."""
    if norm == 0:
        return 0.0
    return norm / base if base > 0 else math.inf


def _larger(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    notes = []
    for expert, by_path in ratios.items():
        large = [path for path, ratio in by_path.items() if ratio > LARGE]
        if large:
            notes.append(
                f"{expert}: the update is up to {max(by_path.values()):.3g} times as large as the "
                f"weight at {examples(large)}; routers that go by norms may follow it alone"
            )
    return notes


def _standing_out(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    usual = {expert: median(by_path.values()) for expert, by_path in ratios.items() if by_path}
    notes = []
    for expert, ratio in usual.items():
        others = [other for name, other in usual.items() if name != expert]
        if others and ratio > OUTLIER * median(others):
            notes.append(
                f"{expert}: relative to the base its updates are {ratio:.3g}, those of the other "
                f"experts {median(others):.3g}; routers that go by norms may follow it alone"
            )
    return notes

"""What a run would train, worked out from the model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from molora.attach import Mixture
from molora.attach.plan import Plan
from molora.attach.targets import Match
from molora.config import Imported
from molora.config.run import RunConfig
from molora.train.loading import load_skeleton
from molora.train.start import attached


@dataclass(frozen=True)
class MatchRow:
    """A target pattern and what it stands for; linears that an earlier row has are not counted
    again."""

    pattern: str
    modules: int
    experts: tuple[int, ...]
    """Numbers of experts per linear that occur, ascending."""
    rank: tuple[int, ...]
    """Ranks that occur, ascending."""
    parameters: int
    """Parameters of the experts; routers are counted by role, since linears may share one."""


@dataclass(frozen=True)
class DryRun:
    """The outcome of attaching without weights."""

    model: str
    method: str
    rows: tuple[MatchRow, ...]
    sites: int
    """Routing decisions per forward."""
    parameters: dict[str, int]
    """Trainable parameters by role: experts, router, and other if modules or tokens are trained."""
    base_parameters: int
    untouched: tuple[str, ...]
    """Fused expert parameters of the base that get no experts, as name and shape."""

    @property
    def trainable(self) -> int:
        """All trainable parameters."""
        return sum(self.parameters.values())

    @property
    def percent_of_base(self) -> float:
        """Trainable parameters in % of the base's."""
        return 100 * self.trainable / self.base_parameters


def dry_run(config: RunConfig) -> DryRun:
    """Attach the mixture on the meta device; no weights, no data, no training.

    Raises:
        ConfigError: a model that cannot be found, allocations that do not fit its layers.
        AttachError: targets that do not fit the model.
    """
    model = load_skeleton(config.model)
    base_parameters = sum(p.numel() for p in model.parameters())
    mixture = attached(config, model)
    return describe(mixture, model=config.model.name, base_parameters=base_parameters)


def describe(mixture: Mixture, *, model: str, base_parameters: int) -> DryRun:
    """The same figures of a mixture that is on a model."""
    placements = {placement.path: placement for placement in mixture.plan.placements}
    rows, seen = [], set[str]()
    for match in _by_last_name(mixture.plan):
        paths = [path for path in match.paths if path not in seen]
        seen.update(paths)
        rows.append(
            MatchRow(
                pattern=match.pattern,
                modules=len(paths),
                experts=_distinct([placements[path].num_experts for path in paths]),
                rank=_distinct([placements[path].rank for path in paths]),
                parameters=sum(_size(mixture.built.banks[path]) for path in paths),
            )
        )
    return DryRun(
        model=model,
        method=mixture.config.method,
        rows=tuple(rows),
        sites=len(mixture.built.sites),
        parameters=mixture.num_parameters(),
        base_parameters=base_parameters,
        untouched=mixture.plan.untouched,
    )


def _by_last_name(plan: Plan) -> list[Match]:
    """The matches; of imported experts, which name every linear by itself, one for each last part
    of their names."""
    exact = {p.path for p in plan.placements if isinstance(p.group.expert, Imported)}
    found: dict[str, tuple[str, ...]] = {}
    for match in plan.matches:
        name = match.pattern.rpartition(".")[2] if match.pattern in exact else match.pattern
        found[name] = (*found.get(name, ()), *match.paths)
    return [Match(name, paths) for name, paths in found.items()]


def render(result: DryRun, console: Console) -> None:
    """Print the match table and the totals."""
    console.print(f"{result.method} on {result.model}", highlight=False, soft_wrap=True)
    table = Table()
    for column in ("pattern", "linears", "experts", "rank", "parameters"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    for row in result.rows:
        table.add_row(
            row.pattern,
            str(row.modules),
            _listed(row.experts),
            _listed(row.rank),
            f"{row.parameters:,}",
        )
    console.print(table)
    for role, count in result.parameters.items():
        console.print(f"{role:>8} {count:>14,}", highlight=False)
    console.print(
        f"{'all':>8} {result.trainable:>14,} = {result.percent_of_base:.3g} % of the base's "
        f"{result.base_parameters:,}; {result.sites} routing sites",
        highlight=False,
    )
    if result.untouched:
        console.print(
            f"The base's own experts get no LoRA experts: {len(result.untouched)} fused "
            f"parameters, such as {result.untouched[0]}.",
            highlight=False,
        )


def _distinct(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(counts)))


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts)) if len(counts) <= 4 else f"{counts[0]}–{counts[-1]}"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

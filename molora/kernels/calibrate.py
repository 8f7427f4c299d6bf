"""Time the backends on this machine, and fit the figures that the cost model computes with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import exp, inf, log

import torch
from torch import Tensor

from molora.errors import BackendError
from molora.kernels import cost
from molora.kernels.backend import BACKENDS, Backend
from molora.kernels.calibration import Calibration, DeviceFigures, DtypeFigures, Line
from molora.kernels.grouped_product import grouped_product
from molora.kernels.work import OPS, Shape, work

Run = Callable[[], object]
THIN = (1, 4, 8, 16, 32, 64, 128, 256, 512)
MIB = (1, 4, 16, 32, 64, 256)
WIDE = 1024
"""The two other sizes of the products whose rates are measured, in values."""


@dataclass(frozen=True)
class Case:
    """A call that is timed: `training` is forward and backward, else forward alone."""

    op: str
    shape: Shape
    dtype: torch.dtype
    device: str
    training: bool


@dataclass(frozen=True)
class Timed:
    """Seconds of a backend in every round, in the order of the rounds."""

    case: Case
    backend: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def fastest(self) -> float:
        """What the machine can do: others that run on it only make times longer."""
        return min(self.rounds)


def time_case(
    case: Case,
    runs: int,
    *,
    table: Mapping[str, Backend] = BACKENDS,
    largest: int = 2**29,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timed]:
    """Time each backend of a table that can run there, side by side in every one of the rounds.

    What needs a tensor of more than `largest` bytes is left out.

    Raises:
        BackendError: fewer than one round.
    """
    if runs < 1:
        raise BackendError(f"runs={runs} measures nothing. Give 1 or more.")
    calls = {
        name: _call(case, backend) for name, backend in table.items() if _runs(name, case, largest)
    }
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    wait = _wait(case.device)
    for number in range(runs + 1):
        for name, call in calls.items():
            start = clock()
            call()
            wait()
            if number:  # the first round plans products and fills caches
                rounds[name].append(clock() - start)
    return [Timed(case, name, tuple(seconds)) for name, seconds in rounds.items()]


def _runs(name: str, case: Case, largest: int) -> bool:
    if name != "reference" and cost.refusal(name, case.dtype, case.device):
        return False
    counted = work(case.op, name, case.shape, case.dtype.itemsize, training=case.training)
    return counted.largest <= largest


def _wait(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _call(case: Case, backend: Backend) -> Run:
    """One call on random inputs, the gradients dropped again."""
    inputs = _inputs(case)
    run = backend.lora_mix if case.op == "lora_mix" else backend.lora_rows
    leaves = [t for t in inputs if t is not None and t.is_floating_point()][:-1]

    def train() -> None:
        output = run(*inputs)
        output.backward(torch.ones_like(output))
        for leaf in leaves:
            leaf.grad = None

    @torch.no_grad()
    def evaluate() -> None:
        run(*inputs)

    if case.training:
        for leaf in leaves:
            leaf.requires_grad_(True)
    return train if case.training else evaluate


def _inputs(case: Case) -> list[Tensor | None]:
    """The arguments of the op, the scaling last."""
    s, source = case.shape, torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=source).to(case.device, dtype)

    order_TE = torch.rand(s.rows, s.num_experts, generator=source).argsort(dim=1)
    index_TK = order_TE[:, : s.slots].contiguous().to(case.device)
    gates_TK = torch.rand(s.rows, s.slots, generator=source).to(case.device)
    lora_A = normal(1 if s.shared_A else s.num_experts, s.rank, s.in_features)
    lora_B = normal(s.num_experts, s.out_features, s.rank)
    scaling = torch.ones(s.num_experts, device=case.device)
    x = normal(s.rows, s.in_features, dtype=case.dtype)
    if case.op == "lora_mix":
        return [x, gates_TK, index_TK, lora_A, lora_B, scaling]
    return [x, index_TK, lora_A, lora_B, scaling]


# ------------------------------------------------------------------------------- the figures


@dataclass(frozen=True)
class Effort:
    """How long a calibration takes: sizes of the cases, and rounds of each measurement."""

    hidden: Sequence[int] = (512, 1024)
    experts: Sequence[int] = (8, 64)
    tokens: Sequence[int] = (1, 16, 128, 1024, 4096)
    rank: int = 8
    top_k: int = 2
    runs: int = 7

    def cases(self, dtype: torch.dtype, device: str) -> Iterator[Case]:
        """Every op, shape and mode."""
        for op in OPS:
            for hidden in self.hidden:
                for experts in self.experts:
                    slots = min(self.top_k, experts)
                    for rows in self.tokens:
                        shape = Shape(rows, hidden, hidden, experts, self.rank, slots)
                        for training in (False, True):
                            yield Case(op, shape, dtype, device, training)


def calibrate(
    effort: Effort,
    *,
    device: str,
    dtypes: Iterable[torch.dtype],
    source: str,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Calibration, list[Timed]]:
    """Measure the constants of a device and fit each backend's line to its measured times.

    Args:
        source: what the file says of where its figures are from.
        progress: is told what is measured next.

    Returns:
        The figures, and the times that they were fitted to.
    """
    with torch.no_grad():
        bandwidth, group = _bandwidth(device, effort.runs), _group(device, effort.runs)
    figures = DeviceFigures(source, bandwidth, group, {})
    table = {name: BACKENDS[name] for name in cost.CANDIDATES if name in BACKENDS}
    times: list[Timed] = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        progress(f"products in {name}")
        with torch.no_grad():
            rates = {k: _rates(k, dtype, device, effort.runs) for k in ("plain", "grouped")}
        of_dtype = []
        for op, cases in groupby(effort.cases(dtype, device), key=lambda case: case.op):
            progress(f"{op} in {name}")
            for case in cases:
                # gather copies its experts for every row: many rows take minutes
                of_dtype += time_case(case, effort.runs, table=table, largest=2**27)
        bare = replace(figures, dtypes={name: DtypeFigures(rates, {})})
        fitted = DtypeFigures(rates, _lines(of_dtype, bare, name))
        whole = Calibration({device: replace(figures, dtypes={name: fitted})})
        # as the file will say it: rounded, a choice can change
        whole = Calibration.parse(whole.text(), "the new calibration")
        fitted = replace(fitted, crossovers=tuple(described(effort, dtype, device, whole)))
        figures = replace(figures, dtypes={**figures.dtypes, name: fitted})
        times += of_dtype
    return Calibration({device: figures}), times


def described(
    effort: Effort, dtype: torch.dtype, device: str, calibration: Calibration
) -> Iterator[str]:
    """What the choice is from how many rows on, for the shapes of an effort."""
    for case in replace(effort, tokens=(1,)).cases(dtype, device):
        found = cost.crossovers(
            case.op,
            case.shape,
            dtype=dtype,
            device_type=device,
            training=case.training,
            calibration=calibration,
        )
        s = case.shape
        choices = ", ".join(f"{name} from {rows}" for rows, name in found)
        mode = "training" if case.training else "forward"
        yield (
            f"{case.op}, {mode}, {s.in_features} to {s.out_features}, top-{s.slots} of "
            f"{s.num_experts} experts of rank {s.rank}: {choices}"
        )


def fit(points: Sequence[tuple[float, float, float]]) -> Line:
    """The line through (in cache, added, measured) seconds whose ratios to these are nearest to 1.

    Least absolute logarithms: a time that something else on the machine made longer has no more
    weight than another.
    """
    constants = [0.0, *(2.0 ** (i / 2) * 1e-7 for i in range(40))]
    spills = [0.0, *(2.0 ** (i / 2) for i in range(-6, 7))]
    shapes = [(1.0, s, c) for s in spills for c in constants] + [(0.0, 0.0, 1.0)]
    best = (inf, Line(0.0, 0.0, 0.0))
    for scale, spill, fixed in shapes:
        gaps = [log(m / (scale * near + spill * added + fixed)) for near, added, m in points]
        factor = statistics.median(gaps)
        error = sum(abs(gap - factor) for gap in gaps)
        if error < best[0]:
            best = (error, Line(*(exp(factor) * part for part in (scale, spill, fixed))))
    return best[1]


def _lines(
    times: Sequence[Timed], device: DeviceFigures, dtype: str
) -> dict[tuple[str, str, str], Line]:
    points: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
    for timed in times:
        case = timed.case
        mode = "training" if case.training else "forward"
        counted = work(
            case.op, timed.backend, case.shape, case.dtype.itemsize, training=case.training
        )
        seconds = cost.counted_seconds(counted, device, device.dtypes[dtype])
        points.setdefault((case.op, timed.backend, mode), []).append((*seconds, timed.fastest))
    return {key: fit(pairs) for key, pairs in points.items()}


def _fastest(run: Run, device: str, runs: int) -> float:
    wait, seconds = _wait(device), []
    for number in range(runs + 1):
        start = time.perf_counter()
        run()
        wait()
        if number:
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def _bandwidth(device: str, runs: int) -> tuple[tuple[float, float], ...]:
    """(bytes, bytes/s) of reading rows in another order into a new tensor, by its size."""
    found = []
    for mib in MIB:
        x_TD = torch.randn(mib * 2**18 // WIDE, WIDE, device=device)
        order_T = torch.randperm(len(x_TD), device=device)
        seconds = _fastest(partial(x_TD.index_select, 0, order_T), device, runs)
        found.append((x_TD.nbytes, 2 * x_TD.nbytes / seconds))
    return tuple(found)


def _group(device: str, runs: int) -> float:
    """Seconds that a group adds to a grouped product of little work."""
    few, many = 1, 65
    rows, weights = torch.randn(many, 8, device=device), torch.randn(many, 8, 8, device=device)

    def seconds(groups: int) -> float:
        ends = torch.arange(1, groups + 1, dtype=torch.int32, device=device)
        return _fastest(
            lambda: grouped_product(rows[:groups], weights[:groups], ends), device, 3 * runs
        )

    return max(0.0, (seconds(many) - seconds(few)) / (many - few))


def _rates(kind: str, dtype: torch.dtype, device: str, runs: int) -> tuple[tuple[int, float], ...]:
    """(smallest dimension, FLOP/s) of down- and up-projections so thin, and of few rows."""
    found = []
    for thin in THIN:
        products = _plain(thin, dtype, device) if kind == "plain" else _sorted(thin, dtype, device)
        flops = 2.0 * WIDE * WIDE * thin
        rates = [flops / _fastest(run, device, runs) for run in products]
        found.append((thin, statistics.harmonic_mean(rates)))
    return tuple(found)


def _plain(thin: int, dtype: torch.dtype, device: str) -> list[Run]:
    wide = torch.randn(WIDE, WIDE, device=device).to(dtype)
    narrow = torch.randn(thin, WIDE, device=device).to(dtype)
    columns = narrow.T.contiguous()
    return [lambda: wide @ narrow.T, lambda: columns @ narrow]


def _sorted(thin: int, dtype: torch.dtype, device: str) -> list[Run]:
    groups = 8
    wide = torch.randn(WIDE, WIDE, device=device).to(dtype)
    narrow = torch.randn(groups, thin, WIDE, device=device).to(dtype)
    columns = torch.randn(WIDE, thin, device=device).to(dtype)
    ends = torch.arange(1, groups + 1, dtype=torch.int32, device=device) * (WIDE // groups)
    return [
        lambda: grouped_product(wide, narrow.transpose(1, 2), ends),
        lambda: grouped_product(columns, narrow, ends),
    ]

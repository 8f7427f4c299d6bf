"""``molora bench``."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from molora.errors import BackendError, ConfigError

if TYPE_CHECKING:
    import torch

    from molora.kernels.calibrate import Case, Effort, Timed
    from molora.kernels.calibration import Calibration

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu", "cuda")
CALIBRATED = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
CLOSE = 1.05
"""Times that are nearer to each other than this are not told apart."""


def bench(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the figures of auto, and keep them.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --calibrate: where to, instead of the user's own."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="Of x; may be given several times. [float32]")
    ] = None,
    hidden: Annotated[
        list[int] | None, typer.Option(min=1, help="Width in and out; several times. [1024]")
    ] = None,
    experts: Annotated[
        list[int] | None, typer.Option(min=1, help="Experts; several times. [8]")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows; several times. [1, 16, 128, 1024]")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of an expert.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts of a row.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Rounds, of which the median counts.")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Lines of JSON, no tables.")] = False,
) -> None:
    """Time the kernel backends, and which of them auto picks.

    A call is an op without the base's product: lora_mix, the gated sum of experts at a linear, or
    lora_rows, each chosen expert by itself, as at an FFN. Backends run side by side in every round.
    With --calibrate, what auto computes with is measured on this machine, which takes minutes, and
    kept in a file that later runs read. What else the machine does changes the figures: let it be
    idle.

    \b
    Example:
      molora bench
      molora bench --hidden 4096 --experts 8 --experts 64 --tokens 1 --tokens 2048
      molora bench --calibrate
    """
    from molora.kernels.calibrate import Effort

    if output is not None and not calibrate:
        raise ConfigError(
            "--output says where --calibrate writes to. Add --calibrate, or leave it."
        )
    _check(device, dtype or (), experts or (), top_k)
    names = dtype or (CALIBRATED[device] if calibrate else ("float32",))
    sizes: dict[str, Any] = {"rank": rank, "top_k": top_k, "runs": runs}
    sizes["hidden"] = hidden or ((512, 1024) if calibrate else (1024,))
    sizes["experts"] = experts or ((8, 64) if calibrate else (8,))
    sizes["tokens"] = tokens or ((1, 16, 128, 1024, 4096) if calibrate else (1, 16, 128, 1024))
    with _threads(threads):
        if calibrate:
            _calibrate(Effort(**sizes), device, names, threads, output, as_json)
        else:
            _bench(Effort(**sizes), device, names, as_json)


def _check(device: str, dtypes: Sequence[str], experts: Sequence[int], top_k: int) -> None:
    import torch

    if device not in DEVICES:
        raise ConfigError(f"--device {device} is not known. Known: {', '.join(DEVICES)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "--device cuda: torch sees no CUDA or ROCm device here. Use --device cpu, or see "
            "`molora doctor` on a machine that has one."
        )
    for name in dtypes:
        if name not in DTYPES:
            raise ConfigError(f"--dtype {name} is not known. Known: {', '.join(DTYPES)}.")
    if experts and top_k > min(experts):
        raise ConfigError(
            f"--top-k {top_k} exceeds --experts {min(experts)}. Lower --top-k or add experts."
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------- a bench


@dataclass(frozen=True)
class Row:
    """One case: milliseconds of each backend, measured and estimated, and what auto picks."""

    case: Case
    measured: Mapping[str, float]
    estimated: Mapping[str, float | None]
    auto: str
    ratio: float
    """Of auto's pick to the fastest: the median over the rounds."""

    @property
    def fastest(self) -> str:
        chosen = {name: ms for name, ms in self.measured.items() if name != "reference"}
        return min(chosen, key=chosen.__getitem__)

    @property
    def verdict(self) -> str:
        if self.auto == self.fastest:
            return "fastest"
        if self.ratio < CLOSE:
            return f"≈ {self.fastest}"
        return f"{self.ratio:.2f} × {self.fastest}"

    def values(self) -> dict[str, Any]:
        """What `--json` prints."""
        s = self.case.shape
        return {
            "op": self.case.op,
            "pass": _pass(self.case),
            "device": self.case.device,
            "dtype": _name(self.case.dtype),
            "tokens": s.rows,
            "hidden": s.in_features,
            "experts": s.num_experts,
            "rank": s.rank,
            "top_k": s.slots,
            "milliseconds": {name: round(ms, 4) for name, ms in self.measured.items()},
            "estimated": {
                name: None if ms is None else round(ms, 4) for name, ms in self.estimated.items()
            },
            "auto": self.auto,
            "fastest": self.fastest,
            "auto_to_fastest": round(self.ratio, 3),
        }


def row_of(times: Sequence[Timed], calibration: Calibration) -> Row:
    """The times of one case, with what the cost model says of it."""
    from molora.kernels import cost

    case = times[0].case
    options: dict[str, Any] = {"dtype": case.dtype, "device_type": case.device}
    options |= {"training": case.training, "calibration": calibration}
    names = tuple(timed.backend for timed in times)
    found = cost.explain(case.op, case.shape, names=names, **options)
    s = case.shape
    auto = cost.choose(
        case.op,
        rows=s.rows,
        in_features=s.in_features,
        out_features=s.out_features,
        num_experts=s.num_experts,
        rank=s.rank,
        slots=s.slots,
        names=tuple(name for name in cost.CANDIDATES if name in names),
        **options,
    )
    rounds = {timed.backend: timed.rounds for timed in times}
    best = min(
        (timed for timed in times if timed.backend != "reference"), key=lambda timed: timed.median
    )
    pairs = zip(rounds[auto], best.rounds, strict=True)
    return Row(
        case,
        measured={timed.backend: timed.median * 1e3 for timed in times},
        estimated={e.backend: None if e.seconds is None else e.seconds * 1e3 for e in found},
        auto=auto,
        ratio=statistics.median(own / fastest for own, fastest in pairs),
    )


def _bench(effort: Effort, device: str, dtypes: Sequence[str], as_json: bool) -> None:
    from molora.kernels.calibrate import time_case
    from molora.kernels.calibration import load_calibration
    from molora.kernels.cost import TRAINING_ROWS

    calibration, rows = load_calibration(), []
    for dtype in map(_dtype, dtypes):
        for case in effort.cases(dtype, device):
            rows.append(row_of(time_case(case, effort.runs), calibration))
            if as_json:
                typer.echo(json.dumps(rows[-1].values()))
    if as_json:
        return
    console = _console()
    console.print(*tables_of(rows))
    figures = calibration.devices.get(device)
    source = "none, so dense" if figures is None else figures.source
    console.print(Text(f"* is what auto picks, by figures of {device}: {source}."))
    console.print(Text(f"In training it picks for {TRAINING_ROWS} rows, whatever a batch has."))


def tables_of(rows: Iterable[Row], *, estimates: bool = False) -> Iterator[Text | Table]:
    """Milliseconds by rows and backend, a title and a table for each op, pass and shape.

    Auto's pick is marked; with `estimates` they stand in brackets.
    """
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(_title(row), []).append(row)
    for title, members in sections.items():
        names = list(dict.fromkeys(name for row in members for name in row.measured))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("rows", *names):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("auto is", no_wrap=True)
        for row in members:
            cells = [_cell(row, name, estimates=estimates) for name in names]
            table.add_row(*map(Text, [str(row.case.shape.rows), *cells, row.verdict]))
        yield Text(title)
        yield table


def _title(row: Row) -> str:
    s, case = row.case.shape, row.case
    return (
        f"{case.op}, {_pass(case)}, {_name(case.dtype)}, {s.in_features} to {s.out_features}, "
        f"top-{s.slots} of {s.num_experts} experts of rank {s.rank}: ms"
    )


def _cell(row: Row, name: str, *, estimates: bool) -> str:
    if name not in row.measured:  # too large
        return "–"
    text = f"{row.measured[name]:.3f}"
    estimated = row.estimated.get(name)
    if estimates and estimated is not None:
        text += f" ({estimated:.3f})"
    return f"{'*' if name == row.auto else ''}{text}"


# ------------------------------------------------------------------------------- a calibration


def _calibrate(
    effort: Effort,
    device: str,
    dtypes: Sequence[str],
    threads: int,
    output: Path | None,
    as_json: bool,
) -> None:
    from molora.kernels.calibrate import calibrate
    from molora.kernels.calibration import DTYPES as KEPT
    from molora.kernels.calibration import Calibration, user_file

    if unkept := [name for name in dtypes if name not in KEPT]:
        raise ConfigError(
            f"--calibrate keeps figures of {', '.join(KEPT)}, not of {unkept[0]}. Leave it out."
        )
    path = output or user_file()
    others = Calibration.load(path).devices if path.is_file() else {}
    calibration, times = calibrate(
        effort,
        device=device,
        dtypes=[_dtype(name) for name in dtypes],
        source=f"measured by molora bench --calibrate on {machine(device, threads)}",
        progress=lambda line: typer.echo(f"Measuring {line} …", err=True),
    )
    rows = [row_of(timed, calibration) for timed in _by_case(times)]
    Calibration({**others, **calibration.devices}).save(path)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row.values()))
        return
    console = _console()
    console.print(Text("Measured (estimated); * is what auto picks.\n"))
    console.print(*tables_of(rows, estimates=True))
    for name, figures in calibration.devices[device].dtypes.items():
        for line in figures.crossovers:
            typer.echo(f"{name}: {line}")
    typer.echo(f"Kept in {path}.")


def _by_case(times: Sequence[Timed]) -> list[list[Timed]]:
    cases: dict[Case, list[Timed]] = {}
    for timed in times:
        cases.setdefault(timed.case, []).append(timed)
    return list(cases.values())


def machine(device: str, threads: int) -> str:
    """What was measured, for the file of figures."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()} with torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{threads} thread(s) of {name} with torch {torch.__version__}"


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pass(case: Case) -> str:
    return "training" if case.training else "forward"


def _console() -> Console:
    """No number is cut off: on a narrower terminal lines go on below."""
    width = max(Console().width, 100)
    return Console(width=width, highlight=False, markup=False, emoji=False)

"""Figures of a machine that the cost model computes with, and the files that hold them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from molora.errors import ConfigError
from molora.kernels.work import BACKENDS, OPS

VERSION = 1
KINDS = ("plain", "grouped")
MODES = ("forward", "training")
DTYPES = ("float32", "bfloat16", "float16")
_REMEDY = "Correct it, or delete the file and run: molora bench --calibrate"


@dataclass(frozen=True)
class Line:
    """Seconds of a call = scale × those of its work in cache + spill × what is added by tensors
    that fit no cache + fixed."""

    scale: float
    spill: float
    fixed: float


@dataclass(frozen=True)
class DtypeFigures:
    """Of one dtype of x.

    Attributes:
        rates: kind of product → (smallest dimension, FLOP/s) in ascending order.
        lines: (op, backend, mode) → line; a backend without one is not chosen.
        crossovers: for who reads the file, where the choice changes with the number of rows.
    """

    rates: Mapping[str, tuple[tuple[float, float], ...]]
    lines: Mapping[tuple[str, str, str], Line]
    crossovers: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeviceFigures:
    """Of one type of device.

    Attributes:
        source: where the figures are from.
        bandwidth: (bytes of a tensor, bytes/s of reading and writing one), of what is no product.
        group: seconds that each group adds to a grouped product.
        dtypes: name of a dtype → its figures.
    """

    source: str
    bandwidth: tuple[tuple[float, float], ...]
    group: float
    dtypes: Mapping[str, DtypeFigures]


@dataclass(frozen=True, eq=False)  # told apart by identity, which is quick to look up
class Calibration:
    """Device type, as torch names it → its figures."""

    devices: Mapping[str, DeviceFigures]

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            ConfigError: it is no such file: unknown keys, another version, or figures that are no
                positive numbers.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}. {_REMEDY}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Calibration:
        """As `load`, from the text; `where` is named in errors."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is not JSON: {error}. {_REMEDY}") from error
        top = _table(values, where, ("version", "devices"))
        if top["version"] != VERSION:
            raise ConfigError(
                f"{where}: version {top['version']!r} is not {VERSION}, the only one that this "
                f"molora reads. {_REMEDY}"
            )
        devices = _table(top["devices"], f"{where}: devices")
        return cls({name: _device(v, f"{where}: {name}") for name, v in devices.items()})

    def save(self, path: Path) -> None:
        """Write a file that people can read, too; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """What `save` writes."""
        devices = {name: _device_values(figures) for name, figures in self.devices.items()}
        return json.dumps({"version": VERSION, "devices": devices}, indent=2) + "\n"

    def figures(self, device_type: str, dtype: str) -> tuple[DeviceFigures, DtypeFigures] | None:
        """Of a dtype, or of the nearest that was measured; None if the device has no figures."""
        device = self.devices.get(device_type)
        if device is None:
            return None
        half = ("bfloat16", "float16") if dtype in ("bfloat16", "float16") else ()
        for name in (dtype, *half, "float32"):
            if name in device.dtypes:
                return device, device.dtypes[name]
        return None


def user_file() -> Path:
    """Where a user's own figures are, in the folder that the system has for configuration."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "molora" / "calibration.json"


@lru_cache(maxsize=1)
def shipped() -> Calibration:
    """The figures that come with molora."""
    resource = files("molora.kernels") / "calibration.json"
    return Calibration.parse(resource.read_text(encoding="utf-8"), "molora's calibration.json")


def load_calibration() -> Calibration:
    """The user's figures of each device that the user's file has, else the shipped ones.

    Raises:
        ConfigError: the user's file is damaged.
    """
    path = user_file()
    if not path.is_file():
        return shipped()
    return Calibration({**shipped().devices, **Calibration.load(path).devices})


# ------------------------------------------------------------------------- reading and writing


def _device(values: Any, where: str) -> DeviceFigures:
    keys = ("source", "gb_per_s_by_mib", "group_us", "dtypes")
    table = _table(values, where, keys)
    dtypes = _table(table["dtypes"], f"{where}.dtypes", optional=DTYPES)
    return DeviceFigures(
        source=str(table["source"]),
        bandwidth=_points(table["gb_per_s_by_mib"], f"{where}.gb_per_s_by_mib", 2**20),
        group=_number(table["group_us"], f"{where}.group_us", zero=True) * 1e-6,
        dtypes={name: _dtype(v, f"{where}.{name}") for name, v in dtypes.items()},
    )


def _dtype(values: Any, where: str) -> DtypeFigures:
    table = _table(values, where, ("gflop_per_s", "backends", "crossovers"))
    rates = {}
    for kind, rate in _table(table["gflop_per_s"], f"{where}.gflop_per_s", KINDS).items():
        rates[kind] = _points(rate, f"{where}.gflop_per_s.{kind}", 1)
    lines = {}
    for op, backends in _table(table["backends"], f"{where}.backends", optional=OPS).items():
        known = _table(backends, f"{where}.{op}", optional=BACKENDS)
        for backend, modes in known.items():
            inner = f"{where}.{op}.{backend}"
            for mode, line in _table(modes, inner, optional=MODES).items():
                keys = ("scale", "spill", "fixed_us")
                found = _table(line, f"{inner}.{mode}", keys)
                scale, spill, fixed = (
                    _number(found[key], f"{inner}.{mode}.{key}", zero=True) for key in keys
                )
                lines[op, backend, mode] = Line(scale, spill, fixed * 1e-6)
    return DtypeFigures(rates, lines, tuple(map(str, table["crossovers"])))


def _points(values: Any, where: str, unit: int) -> tuple[tuple[int, float], ...]:
    """(size, rate) in ascending order of a table of size → 10⁹ a second."""
    entries = _table(values, where)
    if not entries or not all(size.isdecimal() for size in entries):
        raise ConfigError(
            f"{where} has the keys {list(entries)}; they must be sizes such as 8 and 64. {_REMEDY}"
        )
    found = ((int(size), _number(v, f"{where}.{size}")) for size, v in entries.items())
    return tuple(sorted((size * unit, rate * 1e9) for size, rate in found))


def _table(
    values: Any, where: str, keys: Iterable[str] = (), *, optional: Iterable[str] = ()
) -> dict[str, Any]:
    """A JSON object with exactly these keys; without `keys` any of `optional`, if that is given."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a table (got {values!r:.40}). {_REMEDY}")
    required, permitted = set(keys), {*keys, *optional}
    if permitted and not values.keys() <= permitted:
        unknown = sorted(values.keys() - permitted)
        raise ConfigError(f"{where}: unknown {unknown}. Known: {sorted(permitted)}. {_REMEDY}")
    if missing := sorted(required - values.keys()):
        raise ConfigError(f"{where}: {missing} is missing. {_REMEDY}")
    return values


def _number(value: Any, where: str, *, zero: bool = False) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        wanted = "a number of 0 or more" if zero else "a positive number"
        raise ConfigError(f"{where} must be {wanted} (got {value!r}). {_REMEDY}")
    return float(value)


def _device_values(figures: DeviceFigures) -> dict[str, Any]:
    return {
        "source": figures.source,
        "gb_per_s_by_mib": _point_values(figures.bandwidth, 2**20),
        "group_us": _rounded(figures.group * 1e6),
        "dtypes": {name: _dtype_values(values) for name, values in figures.dtypes.items()},
    }


def _dtype_values(figures: DtypeFigures) -> dict[str, Any]:
    backends: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for (op, backend, mode), line in figures.lines.items():
        values = {"scale": _rounded(line.scale), "spill": _rounded(line.spill)}
        values["fixed_us"] = _rounded(line.fixed * 1e6)
        backends.setdefault(op, {}).setdefault(backend, {})[mode] = values
    rates = {kind: _point_values(points, 1) for kind, points in figures.rates.items()}
    crossovers = list(figures.crossovers)
    return {"gflop_per_s": rates, "backends": backends, "crossovers": crossovers}


def _point_values(points: Iterable[tuple[float, float]], unit: int) -> dict[str, float]:
    return {str(round(size / unit)): _rounded(rate / 1e9) for size, rate in points}


def _rounded(value: float) -> float:
    """Four digits: more would say what no measurement knows."""
    return float(f"{value:.4g}")

"""Named adapters that are to be experts of one mixture, checked each and against each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Annotated

from pydantic import AfterValidator
from rich.console import Console
from rich.progress import track
from torch import Tensor

from molora.errors import CheckpointError, ConfigError
from molora.io.adapter import Adapter, AdapterModule, ExpertParameter
from molora.io.hub import adapter_directory
from molora.io.peft_adapter import MAX_RANK, read_adapter
from molora.io.peft_files import CONFIG
from molora.io.peft_keys import examples

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Names of experts: they become names of modules and directories, so neither dots nor slashes."""
MAX_EXPERTS = 4096
MANY = 16
"""So many experts take long enough to show how many are read."""
OUTLIER = 10.0
"""An update that is so many times as large as the median of its module is pointed out."""


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError unless these are names of different experts, at least one."""
    if not 1 <= len(names) <= MAX_EXPERTS:
        raise ConfigError(f"{len(names)} experts were given; give 1 to {MAX_EXPERTS}.")
    seen: set[str] = set()
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"An expert cannot be called {name[:80]!a}. Give up to 64 letters, digits, '_' and "
                "'-', the first a letter or digit."
            )
        if name in seen:
            raise ConfigError(f"The expert {name!r} is there twice. Leave one out.")
        seen.add(name)


def _checked_names(names: tuple[str, ...]) -> tuple[str, ...]:
    check_names(names)
    return names


Names = Annotated[tuple[str, ...], AfterValidator(_checked_names)]
"""Names of different experts, in a file."""


@dataclass(frozen=True, eq=False)
class FrozenExperts:
    """Adapters as they were read, in the caller's order; ranks and modules may differ.

    Attributes:
        adapters: by the expert's name.
        notes: what was set aside or looks wrong; each starts with the names it is about.
    """

    adapters: Mapping[str, Adapter]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The experts in order."""
        return tuple(self.adapters)

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that an expert adapts, in the order in which they are first met."""
        return tuple(
            dict.fromkeys(m for adapter in self.adapters.values() for m in adapter.modules)
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter of stacked weights that an expert adapts, likewise."""
        return tuple(
            dict.fromkeys(p for adapter in self.adapters.values() for p in adapter.parameters)
        )

    def present(self, module: str) -> tuple[bool, ...]:
        """For each expert whether it adapts the module."""
        return tuple(module in adapter.modules for adapter in self.adapters.values())


def load_experts(
    experts: Mapping[str, str | Path] | str | Path,
    *,
    max_rank: int = MAX_RANK,
    allow_pickle: bool = False,
    leave_out: bool = False,
    initial: Mapping[str, str | Path] | None = None,
    base_weight: Callable[[str], Tensor] | None = None,
    progress: bool | None = None,
) -> FrozenExperts:
    """Read directories that package peft saved as experts, without a model and without a copy.

    Args:
        experts: name → directory with `adapter_config.json` and `adapter_model.safetensors`, or id
            of the hub such as "owner/name" or "owner/name@revision"; or one directory, whose
            sub-directories with an adapter are the experts.
        max_rank: the largest rank to accept.
        allow_pickle: read `adapter_model.bin` where there is nothing else: of files that you trust.
        leave_out: take adapters that also replace parts of the base (modules_to_save, rows of
            tokens, embeddings, biases) without them, which notes name; they were trained with them.
        initial: name → directory with the factors before training, for experts whose start took a
            part out of the base (PiSSA, OLoRA, CorDA, LoRA-GA).
        base_weight: for PiSSA and OLoRA instead: the untouched weight (out, in) of a module.
        progress: whether a bar on stderr shows how many are read; by default if they are many and
            stderr is a terminal.

    Raises:
        ConfigError: names that cannot be, or settings that are not supported.
        CheckpointError: files that are missing, damaged, no LoRA, or for different bases.
    """
    places = experts if isinstance(experts, Mapping) else _within(Path(experts))
    check_names(list(places))
    before = {} if initial is None else initial
    unknown = sorted({*before} - {*places})
    if unknown:
        raise ConfigError(f"initial names {examples(unknown)}, which are no experts.")
    directory = partial(adapter_directory, allow_pickle=allow_pickle)
    adapters = {}
    for name, place in _shown(places, progress):
        start = before.get(name)
        adapters[name] = read_adapter(
            directory(place),
            max_rank=max_rank,
            allow_pickle=allow_pickle,
            leave_out=leave_out,
            initial=None if start is None else directory(start),
            base_weight=base_weight,
        )
    _check_shapes_agree(adapters)
    notes = [f"{name}: {note}" for name, adapter in adapters.items() for note in adapter.notes]
    notes += [*_twice(adapters), *_different_bases(adapters), *_outliers(adapters)]
    return FrozenExperts(MappingProxyType(adapters), tuple(notes))


def _within(root: Path) -> dict[str, Path]:
    """The sub-directories with an adapter by name, those that are numbers in their order."""
    try:
        every = [path for path in root.iterdir() if not path.is_symlink()]
        found = [path for path in every if (path / CONFIG).is_file()]
    except OSError as error:
        raise CheckpointError(f"{root} is no directory of adapters: {error}.") from None
    if not found:
        raise CheckpointError(
            f"No sub-directory of {root} has a {CONFIG}. Give a directory of adapters, or names "
            "and directories."
        )
    numbered = [(len(p.name) if p.name.isdecimal() else 99, p.name, p) for p in found]
    return {name: path for _, name, path in sorted(numbered)}


def _shown(
    experts: Mapping[str, str | Path], progress: bool | None
) -> Iterable[tuple[str, str | Path]]:
    console = Console(stderr=True)
    if progress is None:
        progress = console.is_terminal and len(experts) >= MANY
    if not progress:  # track starts a thread even where it shows nothing
        return experts.items()
    return track(experts.items(), "Reading experts", len(experts), console=console)


def _check_shapes_agree(adapters: Mapping[str, Adapter]) -> None:
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, adapter in adapters.items():
        for path, part in _parts(adapter).items():
            *stacked, _, size_in = part.lora_A.shape
            size = (*stacked, size_in, part.lora_B.shape[-2])
            other, expected = first.setdefault(path, (name, size))
            if expected != size:
                raise CheckpointError(
                    f"{path} maps {_mapped(size)} features in expert {name}, but "
                    f"{_mapped(expected)} in {other}. They were trained on different bases; leave "
                    "one out."
                )


def _mapped(size: tuple[int, ...]) -> str:
    *stacked, size_in, size_out = size
    return f"{size_in} to {size_out}" + "".join(f" in {number} weights" for number in stacked)


def _parts(adapter: Adapter) -> dict[str, AdapterModule | ExpertParameter]:
    return {**adapter.modules, **adapter.parameters}


def _twice(adapters: Mapping[str, Adapter]) -> list[str]:
    first: dict[str, str] = {}
    pairs = [(first.setdefault(adapter.sha256, name), name) for name, adapter in adapters.items()]
    return [f"{a}, {b}: their tensors are the same" for a, b in pairs if a != b]


def _different_bases(adapters: Mapping[str, Adapter]) -> list[str]:
    bases: dict[tuple[str, str | None], list[str]] = {}
    for name, adapter in adapters.items():
        if adapter.base is not None:
            bases.setdefault((adapter.base, adapter.revision), []).append(name)
    if len(bases) < 2:
        return []
    return [
        f"{examples(names)}: trained on {ascii(base)[:200]}, revision {ascii(revision)[:80]}; "
        "other experts name another base"
        for (base, revision), names in bases.items()
    ]


def _outliers(adapters: Mapping[str, Adapter]) -> list[str]:
    """Experts whose updates dwarf those of the others, of which three or more are compared."""
    norms: dict[str, dict[str, float]] = {}
    for name, adapter in adapters.items():
        for path, part in _parts(adapter).items():
            norms.setdefault(path, {})[name] = part.update_norm
    found: dict[str, list[str]] = {}
    for path, by_name in norms.items():
        usual = median(by_name.values())
        for name, norm in by_name.items():
            if len(by_name) >= 3 and norm > OUTLIER * usual:
                found.setdefault(name, []).append(path)
    return [
        f"{name}: the update is more than {OUTLIER:g} times the experts' median at "
        f"{examples(paths)}; routers that go by norms may follow it alone"
        for name, paths in found.items()
    ]

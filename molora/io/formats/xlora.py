"""X-LoRA: the directory of package peft, and that of the authors' package (arXiv 2402.07148).

Both have settings and the classifier; the adapters lie in directories of their own, of which the
settings say where they once were. A path from a settings file is followed only inside the directory
that has the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from molora.config.base import Frozen
from molora.errors import CheckpointError, ConfigError
from molora.io.formats.parsing import Count, Number, Positive, Text, json_object, known_of, parsed
from molora.io.formats.xlora_classifier import Dense, read_layers
from molora.io.peft_files import CONFIG, TENSORS, bounded_header, inside
from molora.io.peft_keys import examples

AUTHORS_CONFIG = "xlora_config.json"
AUTHORS_TENSORS = "xlora_classifier.safetensors"
PREFIX = "base_model.internal_xlora_classifier.layers."
MAX_ADAPTERS = 4096
WITHOUT_EFFECT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "device"),
    *("base_model_name_or_path", "revision", "base_model_id", "use_trainable_adapters"),
    *("runtime_config", "adapters"),
)


class XLoraSettings(Frozen):
    """What of the settings says how gates follow from the last hidden state, by their names there.

    logits = classifier(h) (…, L·E or E); s = softmax(logits / softmax_temperature) if
    `enable_softmax`; of these the `top_k_lora` largest stay, the rest are 0; softmax over those
    that are not 0 if `enable_softmax_topk`; times `global_scaling_weight`.
    """

    hidden_size: Count = 4096
    """Width of the base."""
    layerwise_scalings: StrictBool = False
    """Gates for each adapted module instead of one for all."""
    xlora_depth: Annotated[StrictInt, Field(ge=1, le=64)] = 1
    """Layers of the classifier; ReLU is between them."""
    xlora_size: Count = 2048
    """Width between layers."""
    xlora_dropout_p: Annotated[StrictInt | StrictFloat, Field(ge=0, le=1)] = 0.2
    """Dropout after each ReLU."""
    enable_softmax: StrictBool = True
    """See above."""
    enable_softmax_topk: StrictBool = False
    """See above."""
    softmax_temperature: Positive = 1.0
    """See above."""
    top_k_lora: Count | None = None
    """See above; None: all."""
    scaling_pass_value: Number | None = 0.0
    """Every gate in the pass that gives h; None: 1 / E."""
    global_scaling_weight: Number = 1.0
    """See above."""
    enable_relu_and_dropout: StrictBool = True
    """Of the authors' package: without, layers follow each other."""
    use_bias: StrictBool = True
    """Of the authors' package."""


@dataclass(frozen=True, eq=False)
class XLora:
    """A mixture as it was read.

    Attributes:
        source: the directory.
        settings: how gates follow from the classifier.
        adapters: name → directory, in the order of the classifier's columns.
        layers: of the classifier, in order; None where it is to be drawn anew.
        num_modules: L, how many modules have gates of their own; None without `layerwise_scalings`
            or without the last layer.
        notes: what was set aside.
    """

    source: Path
    settings: XLoraSettings
    adapters: Mapping[str, Path]
    layers: tuple[Dense | None, ...]
    num_modules: int | None
    notes: tuple[str, ...]


def read_xlora(
    directory: Path,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    allow_reinit: bool = False,
) -> XLora:
    """An X-LoRA of package peft (`adapter_config.json`) or of its authors (`xlora_config.json`).

    Args:
        directory: with the settings and the classifier.
        adapters: name → directory of each adapter, where they do not lie in `directory`.
        allow_reinit: accept a classifier that lacks layers.

    Raises:
        CheckpointError: files that are missing or damaged, a classifier that lacks layers, or
            adapters that are elsewhere.
        ConfigError: settings that cannot be.
    """
    try:
        return _read(directory, adapters, allow_reinit)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}.") from None


def _read(directory: Path, adapters: Mapping[str, str | Path] | None, allow_reinit: bool) -> XLora:
    theirs = (directory / AUTHORS_CONFIG).exists()
    config = _file(directory, AUTHORS_CONFIG if theirs else CONFIG)
    data, where = json_object(config), str(config)
    if not theirs and data.get("peft_type") != "XLORA":
        raise ConfigError(f"{where}: peft_type is not XLORA but {data.get('peft_type')!a:.80}.")
    known, notes = known_of(XLoraSettings, data, also=WITHOUT_EFFECT, where=where)
    settings = parsed(XLoraSettings, known, where=where)
    if settings.enable_softmax and settings.enable_softmax_topk:
        notes.append("both softmaxes are set: gates are a softmax of a softmax")
    if theirs and settings.enable_softmax_topk:
        notes.append("enable_softmax_topk: its authors' package takes it over all tokens at once")
    columns = _columns(data.get("adapters"), adapters, where, notes, in_peft=not theirs)
    if settings.top_k_lora is not None and settings.top_k_lora > len(columns):
        raise ConfigError(f"{where}: top_k_lora is larger than the {len(columns)} adapters.")
    file = _file(directory, AUTHORS_TENSORS if theirs else TENSORS)
    layers = _layers(file, settings, len(columns), theirs, allow_reinit)
    lacking = [str(number) for number, layer in enumerate(layers) if layer is None]
    if lacking:
        notes.append(f"layers {examples(lacking)} of the classifier are to be drawn anew")
    last = layers[-1]
    outputs = None if last is None or not settings.layerwise_scalings else last.weight.shape[0]
    if outputs is not None and outputs % len(columns):
        raise CheckpointError(
            f"{file}: the last layer has {outputs} outputs, which are not gates of {len(columns)} "
            "adapters for each module. The files do not belong together."
        )
    return XLora(
        source=directory,
        settings=settings,
        adapters=MappingProxyType({n: _place(directory, n, p) for n, p in columns.items()}),
        layers=layers,
        num_modules=None if outputs is None else outputs // len(columns),
        notes=tuple(notes),
    )


def _file(directory: Path, name: str) -> Path:
    parts = f"{CONFIG} and {TENSORS}, or {AUTHORS_CONFIG} and {AUTHORS_TENSORS}"
    return inside(directory, name, what="an X-LoRA", parts=parts)


def _columns(
    stated: Any,
    given: Mapping[str, str | Path] | None,
    where: str,
    notes: list[str],
    *,
    in_peft: bool,
) -> dict[str, str | Path | None]:
    """name → what the caller says, or else the settings, in the order of the columns.

    Package peft only runs with the names 0, 1, … in this order, but sorts them as texts when it
    saves, and from 11 adapters on takes other columns for them when it loads.
    """
    names = list(stated) if isinstance(stated, dict | list) else []
    texts = [*names, *(stated.values() if isinstance(stated, dict) else ())]
    if not 1 <= len(names) <= MAX_ADAPTERS or len({*map(str, names)}) < len(names):
        raise ConfigError(f"{where}: adapters are no 1 to {MAX_ADAPTERS} different names.")
    for text in texts:
        parsed(_Name, {"name": text}, where=f"{where}: adapters")
    if given is not None and {*given} != {*names}:
        differing = examples(sorted({*given} ^ {*names}))
        raise ConfigError(f"{where}: adapters and those that were given differ: {differing}.")
    places = dict(stated) if isinstance(stated, dict) else dict.fromkeys(names)
    if given is not None:
        places = {name: Path(given[name]) for name in names}
    if in_peft:
        numbers = [str(number) for number in range(len(names))]
        if sorted(names) == sorted(numbers):
            names = numbers
        else:
            notes.append(
                "package peft sorts adapters by name when it saves: compare their order with that "
                "of the training"
            )
    return {name: places[name] for name in names}


class _Name(Frozen):
    name: Text


def _layers(
    file: Path, settings: XLoraSettings, num_adapters: int, theirs: bool, allow_reinit: bool
) -> tuple[Dense | None, ...]:
    depth = settings.xlora_depth
    if theirs:
        step = 3 if settings.enable_relu_and_dropout else 1
        names = [*(f"inner.{number * step}" for number in range(depth - 1)), "last"]
    else:
        step = 3 if settings.xlora_dropout_p > 0 else 2
        prefix = PREFIX
        if not any(name.startswith("base_model.") for name in bounded_header(file)):
            prefix = PREFIX.removeprefix("base_model.")
        names = [f"{prefix}{number * step}" for number in range(depth)]
    outputs = None if settings.layerwise_scalings else num_adapters
    widths = [settings.hidden_size, *[settings.xlora_size] * (depth - 1), outputs]
    return read_layers(
        file, names, widths, bias=settings.use_bias or not theirs, allow_reinit=allow_reinit
    )


def _place(directory: Path, name: str, place: str | Path | None) -> Path:
    """The adapter's directory: what the caller gave, or one inside that of the mixture."""
    if isinstance(place, Path):
        return place
    root = directory.resolve()
    for candidate in (place, name):
        try:
            path = root if candidate is None else (directory / candidate).resolve()
            inner = path != root and path.is_relative_to(root)
            if inner and (path / TENSORS).is_file() and not _leftover(path / TENSORS):
                return path
        except (OSError, ValueError, RuntimeError):  # what no path can be
            continue
    raise CheckpointError(
        f"{directory} has no adapter {name[:80]!a}: the settings say {ascii(place)[:200]}, and "
        "nothing outside the directory is opened because they say so; what package peft writes "
        "beside them is no adapter. Give adapters={name: directory, …}."
    )


def _leftover(file: Path) -> bool:
    """Whether it is what package peft leaves in directories called as adapters: parts of the base
    and of the classifier."""
    return any(name.startswith("base_model.lora_model.") for name in bounded_header(file))

"""One LoRA in the shape that every server loads: vLLM, SGLang, LoRAX, S-LoRA, Punica.

Servers differ in what they read of a configuration and drop the rest in silence (rsLoRA, patterns,
biases, projections of which one layer is without). So the export leaves nothing to read: scalings
are in B and alpha is the rank, one rank of those that kernels are compiled for, no patterns, every
target in every layer, and q, k, v as well as gate and up together, with zeros where the LoRA has
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.compose.merging.factors import update_norm
from molora.errors import ConfigError
from molora.io.peft_adapter import AdapterModule
from molora.io.peft_keys import examples
from molora.io.peft_write import write_adapter

RANKS = (8, 16, 32, 64, 128)
"""Ranks that all servers' kernels have."""
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that servers fuse, and expect all of."""
TWINS = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}
"""Projections of one size."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYER = re.compile(r"(?<=\.)\d{1,4}(?=\.)")
"""A layer's number."""
MAX_LAYERS = 1000
"""Layers in one stack: what is missing in each is filled in."""


@dataclass(frozen=True, eq=False)
class Servable:
    """A LoRA of one rank, ready to be written.

    Attributes:
        modules: by name; scalings 1, no biases.
        rank: of `RANKS`.
        filled: modules that do nothing and are there because servers expect them.
        rounding: largest ‖difference‖ / ‖B A‖ of a module by the cast; 0 for a wider type.
    """

    modules: Mapping[str, AdapterModule]
    rank: int
    filled: tuple[str, ...]
    rounding: float


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """name → (out, in) of every linear of a base, for `servable`."""
    shapes = {}
    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            shapes[path] = module.nf, module.nx
        elif isinstance(module, nn.Linear):
            shapes[path] = module.out_features, module.in_features
    return shapes


def servable(
    modules: Mapping[str, AdapterModule],
    *,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Servable:
    """The same function in the servers' shape, but for the rounding to `dtype`.

    Args:
        modules: of an expert or of a merge; not changed. Whether an expert is more than its modules
            says `merging.kinds.check_fixed_update`.
        shapes: name → (out, in) of the base's linears, from `linear_shapes`. Without it, layers are
            counted up to the last one that is adapted, and the sizes of what is missing are taken
            from other layers, of k from v, of gate from up, and the other way round.
        dtype: float32, float16 or bfloat16.

    Raises:
        ConfigError: a rank above 128, a bias, DoRA, values too large for float16, or missing
            modules whose sizes are not known.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"Servers read float32, float16 and bfloat16, not {dtype}.")
    rank = _rank(modules)
    _check_plain(modules)
    missing = _missing(modules, shapes)
    done: dict[str, AdapterModule] = {}
    rounding = 0.0
    for path, module in modules.items():
        done[path], lost = _padded(path, module, rank, dtype)
        rounding = max(rounding, lost)
    for path, (out, size) in missing.items():
        zeros = torch.zeros(rank, size, dtype=dtype), torch.zeros(out, rank, dtype=dtype)
        done[path] = AdapterModule(*zeros, 1.0, 0.0)
    return Servable(MappingProxyType(done), rank, tuple(missing), rounding)


def write_servable(
    directory: Path,
    modules: Mapping[str, AdapterModule],
    *,
    base: str | None = None,
    revision: str | None = None,
    fan_in_fan_out: bool = False,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Servable:
    """Write `servable(modules)` for package peft and servers; the directory must be new or empty.

    Raises:
        ConfigError: as in `servable`.
        CheckpointError: as in `write_adapter`.
    """
    made = servable(modules, shapes=shapes, dtype=dtype)
    write_adapter(
        directory,
        made.modules,
        base=base,
        revision=revision,
        fan_in_fan_out=fan_in_fan_out,
        leaf_targets=True,
    )
    return made


def _rank(modules: Mapping[str, AdapterModule]) -> int:
    if not modules:
        raise ConfigError("There are no modules to export.")
    largest = max(module.rank for module in modules.values())
    if largest > RANKS[-1]:
        raise ConfigError(
            f"The rank is {largest}, and servers have kernels up to {RANKS[-1]}. Merge with "
            f"method='svd' and rank={RANKS[-1]} or less first."
        )
    return next(rank for rank in RANKS if rank >= largest)


def _check_plain(modules: Mapping[str, AdapterModule]) -> None:
    scaled = [path for path, module in modules.items() if module.magnitude is not None]
    if scaled:
        raise ConfigError(f"{examples(scaled)} use DoRA, which servers refuse or ignore.")
    biased = [p for p, m in modules.items() if m.bias is not None and bool(m.bias.any())]
    if biased:
        raise ConfigError(
            f"{examples(biased)} have a bias beside lora_B, which servers refuse or ignore. Train "
            "without lora_bias."
        )


def _padded(
    path: str, module: AdapterModule, rank: int, dtype: torch.dtype
) -> tuple[AdapterModule, float]:
    """The module with its scaling in B and zeros up to the rank; the relative error of the cast."""
    exact_A = module.lora_A.double()
    exact_B = module.lora_B.double() * module.scaling
    lora_A, lora_B = exact_A.to(dtype), exact_B.to(dtype)
    if not (lora_A.isfinite().all() and lora_B.isfinite().all()):
        raise ConfigError(f"{path} has values beyond {dtype}. Take bfloat16 or float32.")
    norm = update_norm(exact_A, exact_B)
    lost = _difference(lora_A, lora_B, exact_A, exact_B) / norm if norm else 0.0
    more = rank - module.rank
    pad = nn.functional.pad
    padded = pad(lora_A, (0, 0, 0, more)), pad(lora_B, (0, more))
    return AdapterModule(*padded, 1.0, norm), lost


def _difference(A: Tensor, B: Tensor, exact_A: Tensor, exact_B: Tensor) -> float:
    if torch.equal(A.double(), exact_A) and torch.equal(B.double(), exact_B):
        return 0.0
    return update_norm(torch.cat([A.double(), exact_A]), torch.cat([B.double(), -exact_B], dim=1))


def _missing(
    modules: Mapping[str, AdapterModule], shapes: Mapping[str, tuple[int, int]] | None
) -> dict[str, tuple[int, int]]:
    """name → (out, in) of what servers expect beside the modules."""
    own = {path: (m.lora_B.shape[0], m.lora_A.shape[1]) for path, m in modules.items()}
    if shapes is None:
        return _inferred(own)
    wrong = [path for path, shape in own.items() if shapes.get(path) != shape]
    if wrong:
        raise ConfigError(
            f"{examples(wrong)} are no linears of this base, or of other sizes. Give the base that "
            "the experts were trained on."
        )
    leaves = _with_partners({_leaf(path) for path in own})
    return {
        path: shape for path, shape in shapes.items() if _leaf(path) in leaves and path not in own
    }


def _inferred(own: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """From the modules alone: every kind of module in every layer up to the last."""
    kinds: dict[str, tuple[int, int]] = {}
    counts: dict[str, int] = {}  # by what stands before the layer's number
    for path, shape in own.items():
        kind = LAYER.sub("*", path, count=1)
        kinds[kind] = shape
        for number in LAYER.findall(path)[:1]:
            stack = kind.split("*")[0]
            counts[stack] = max(counts.get(stack, 0), int(number) + 1)
    if max(counts.values(), default=0) > MAX_LAYERS:
        raise ConfigError(
            f"Layer {max(counts.values()) - 1} is adapted; of at most {MAX_LAYERS} layers the "
            "missing ones are filled in. Give the base's shapes."
        )
    for kind in list(kinds):
        parent, _, leaf = kind.rpartition(".")
        for partner in sorted(_with_partners({leaf}) - {leaf}):
            name = f"{parent}.{partner}" if parent else partner
            if name not in kinds:
                kinds[name] = _size_of_partner(name, kinds)
    wanted = {
        kind.replace("*", str(layer)): shape
        for kind, shape in kinds.items()
        for layer in range(counts.get(kind.split("*")[0], 1))
    }
    return {path: shape for path, shape in wanted.items() if path not in own}


def _size_of_partner(name: str, kinds: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """That of the one that is of the same size: gate and up are, and k and v."""
    parent, _, leaf = name.rpartition(".")
    if leaf in TWINS:
        beside = f"{parent}.{TWINS[leaf]}" if parent else TWINS[leaf]
        if beside in kinds:
            return kinds[beside]
    raise ConfigError(
        f"Servers expect {name} beside the other projections, and no layer tells its size. Give "
        "the base's shapes."
    )


def _with_partners(leaves: set[str]) -> set[str]:
    return leaves.union(*(group for group in TOGETHER if leaves.intersection(group)))


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]

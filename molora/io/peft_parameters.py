"""Factors of parameters that hold the stacked weights of a base's own experts.

Package peft wraps the module that has the parameter, so names in the file are the module's; of two
parameters in one module the later is outside, and the earlier has `base_layer` in its names (peft
0.21.2, `ParamWrapper`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from einops import rearrange
from torch import Tensor

from molora.errors import CheckpointError
from molora.io.adapter import ExpertParameter
from molora.io.header import TensorInfo
from molora.io.peft_config import AdapterConfig
from molora.io.peft_keys import TYPES, PartNames, shown
from molora.io.peft_values import checked_norm

NESTED = ".base_layer"
ORDER = ("gate_up_proj", "down_proj")
"""Parameters in the order in which the modules of transformers have them: the order decides which
is outside, and the files do not say it."""
EXPERTS = "experts"
"""How the modules of transformers with stacked weights are called."""
MAX_EXPERTS = 4096
"""Weights in one parameter."""


def split_parameters(
    path: Path, config: AdapterConfig, names: Mapping[str, PartNames]
) -> tuple[dict[str, PartNames], dict[str, PartNames]]:
    """(by module, by parameter) what the file has names for.

    Raises:
        CheckpointError: factors of a parameter that the configuration does not name, or of several
            whose order is not known.
    """
    depths: dict[str, int] = {}
    for name in names:
        module, depth = name, 0
        while module.endswith(NESTED):
            module, depth = module.removesuffix(NESTED), depth + 1
        depths[module] = max(depths.get(module, 0), depth)
    holders: dict[str, dict[str, None]] = {}
    for target in config.target_parameters or ():
        holder, _, parameter = target.rpartition(".")
        holders.setdefault(holder, {})[parameter] = None
    modules: dict[str, PartNames] = {}
    parameters: dict[str, PartNames] = {}
    for module, depth in depths.items():
        targeted = _parameters_of(module, holders)
        if depth == 0 and not targeted:
            modules[module] = names[module]
            continue
        inside_out = _order(path, module, targeted, depth)
        for level, parameter in enumerate(inside_out):
            nested = module + NESTED * (depth - level)
            if nested not in names or names[nested].vectors:
                raise CheckpointError(
                    f"{path} has no factors of {nested}, or vectors beside them, but factors of "
                    f"parameters come one within the other and alone. The file is damaged."
                )
            parameters[f"{module}.{parameter}"] = names[nested]
    return modules, parameters


def _parameters_of(module: str, holders: Mapping[str, Mapping[str, None]]) -> list[str]:
    """The module's parameters that `target_parameters` names, which are in `holders` by what stands
    before them: whole, by an end, or, where the module is called as the stacked ones are, by the
    last part alone."""
    parts = module.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts))]
    ends += [""] * (parts[-1] == EXPERTS)
    return list(dict.fromkeys(parameter for end in ends for parameter in holders.get(end, ())))


def _order(path: Path, module: str, targeted: list[str], depth: int) -> list[str]:
    known = [name for name in ORDER if name in targeted]
    if len(targeted) == depth + 1 and (depth == 0 or len(known) == len(targeted)):
        return known if depth else targeted
    raise CheckpointError(
        f"{path} has factors of {depth + 1} parameters of {module}, and target_parameters name "
        f"{ascii(targeted)[:200]} there. Which factors are whose is known for one parameter, or "
        f"for {' and '.join(ORDER)}; convert the adapter."
    )


def check_stacked_shapes(
    path: Path,
    infos: Mapping[str, TensorInfo],
    parameters: Mapping[str, PartNames],
    ranks: Mapping[str, int],
    *,
    max_rank: int,
) -> None:
    """Raise CheckpointError unless A is (E·R, in) and B is (out, R·E), of floats, with R the rank
    that the configuration gives and at most `max_rank`."""
    for name, parts in parameters.items():
        a, b, rank = infos[parts.lora_A], infos[parts.lora_B], ranks[name]
        for info in (a, b):
            if info.dtype not in TYPES or len(info.shape) != 2 or 0 in info.shape:
                raise CheckpointError(
                    f"{path}: a factor of {name} is {shown(info)}; factors are matrices of "
                    f"{', '.join(TYPES)}, none of size 0. The file is damaged."
                )
        rows = a.shape[0]
        if rank > max_rank or rows % rank or rows != b.shape[1] or rows // rank > MAX_EXPERTS:
            raise CheckpointError(
                f"{path}: the factors of {name} are {shown(a)} and {shown(b)}; with the rank "
                f"{str(rank)[:20]} of adapter_config.json, which may be {max_rank}, they are "
                f"(E·rank, in) and (out, rank·E) for at most {MAX_EXPERTS} stacked weights. The "
                "files do not belong together, or max_rank is too small."
            )


def checked_parameter(
    path: Path,
    name: str,
    parts: PartNames,
    tensors: Mapping[str, Tensor],
    scaling: float,
    rank: int,
) -> ExpertParameter:
    """The factors of one parameter, as views: A lies by expert, then by rank, and B the other way.

    Raises:
        CheckpointError: values that are not finite or out of every measure.
    """
    lora_A = rearrange(tensors[parts.lora_A], "(e r) i -> e r i", r=rank)
    lora_B = rearrange(tensors[parts.lora_B], "o (r e) -> e o r", r=rank)
    norm = checked_norm(path, name, lora_A, lora_B, scaling)
    return ExpertParameter(lora_A, lora_B, scaling, norm)

"""A base's own experts, whose weights lie stacked in parameters: which adapters can adapt, and how
their banks are put on.

Modules of transformers with stacked weights say by attributes how these lie and are used
(`use_experts_implementation`); all that do are known here, whatever family they belong to.

A bank is the child `gate_up_proj_lora` or `down_proj_lora` of that module. In a mixture's state
dict it goes by the parameter: `{path of the parameter}.experts.lora_A` (E · E_b, R, in) and
`.lora_B` (E · E_b, out, R), the factors of expert e for weight j at e · E_b + j; further blocks are
`.experts.1.lora_A` and so on. A router that reads hidden states decides for both parameters, as
`{path of the module}.router.weight`: with missing="mask" it may choose experts that adapt one of
them, whose part at the other is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from molora.attach.targets import Match
from molora.config import Fixed, Given, Group, Imported, LinearRouter, XLoRA
from molora.errors import AttachError, ConfigError
from molora.modules import RoutingSite
from molora.modules.stacked import Decision, MoLoRAStackedExperts, StackedProjection

if TYPE_CHECKING:
    from molora.attach.build import Builder
    from molora.attach.plan import Placement

OUTER = "down_proj"
SAYS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
"""Attributes by which a module with stacked weights says what it is."""


def check_stacked(group: Group) -> None:
    """Raise ConfigError if experts of stacked weights are trained, or if the group's router or site
    cannot decide for them."""
    form = group.expert
    if not isinstance(form, Imported) or not form.stacked:
        return
    first = next(iter(form.stacked))
    for expert in form.experts:
        adapted = next((path for path in form.stacked if path in expert.modules), None)
        if expert.trainable and adapted is not None:
            raise ConfigError(
                f"{expert.name} adapts {adapted}, stacked weights of a base that is itself a "
                "mixture of experts, whose adapters stay frozen here. Keep it frozen, or leave it "
                "out."
            )
    if not isinstance(group.router, LinearRouter | Fixed | Given | XLoRA):
        raise ConfigError(
            f"a router of kind {group.router.kind!r} compares a linear's input with the experts' "
            f"updates of that linear, but {first} holds one update for each of "
            f"{form.stacked[first]} weights, among which the base chooses afterwards. Use a "
            "learned router ('linear', 'moa', 'lora_flow', 'xlora' …), gates that are 'given', or "
            "'fixed' or 'uniform' weights; or leave experts of stacked weights out."
        )
    if group.site.kind != "linear" or form.dropout.mask != "shared":
        raise ConfigError(
            f"experts of {first}, stacked weights of the base, need site.kind='linear' and "
            "expert.dropout.mask='shared'."
        )


def match_parameters(model: nn.Module, stacked: Mapping[str, int]) -> tuple[Match, ...]:
    """Each path as a parameter with so many stacked weights.

    Raises:
        AttachError: a path that the model has not, or not as stacked weights that are known here.
    """
    for path, count in stacked.items():
        _check_known(model, path)
        shape = tuple(model.get_parameter(path).shape)
        if len(shape) != 3 or shape[0] != count:
            raise AttachError(
                f"an expert adapts {count} stacked weights of {path}, which has the shape "
                f"{shape} here. It was trained on another base, or the base is partitioned; "
                "stacked weights must be whole when experts are put on them."
            )
    return tuple(Match(path, (path,)) for path in stacked)


def _check_known(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    try:
        module: Any = model.get_submodule(parent)
        module.get_parameter(name)
    except AttributeError:
        raise AttachError(
            f"an expert adapts {path}, stacked weights that this model has not. It was trained on "
            "another base, or under another version of transformers."
        ) from None
    if not all(hasattr(module, said) for said in SAYS) or name not in projections(module):
        raise AttachError(
            f"an expert adapts {path}, a parameter of a {type(module).__name__}. Experts go on "
            "gate_up_proj, up_proj and down_proj of modules of transformers with stacked weights, "
            "and not on a base's own router. Leave the expert out, or merge it into the base."
        )
    if getattr(module, "_is_expert_parallel", False):
        raise AttachError(
            f"the base's experts at {parent} are divided among processes, so that experts cannot "
            "be put on them. Load the base without expert parallelism."
        )
    if not module.get_parameter(name).is_floating_point():
        raise AttachError(
            f"{path} is quantised. Experts of stacked weights need weights in floating point."
        )


def stack_sizes(model: nn.Module) -> set[int]:
    """How many weights lie in the model's modules with stacked weights."""
    found: set[int] = set()
    for module in model.modules():
        if all(hasattr(module, said) for said in SAYS):
            known: Any = module
            found.add(known.num_experts)
    return found


def projections(module: Any) -> tuple[str, str]:
    """Names of the parameter that reads hidden states and of the one that leads back."""
    return ("gate_up_proj" if module.has_gate else "up_proj", OUTER)


def stacked_features(model: nn.Module, path: str) -> tuple[int, int]:
    """(in, out) of every weight in a parameter."""
    _, first, second = model.get_parameter(path).shape
    return (first, second) if _module(model, path).is_transposed else (second, first)


def _module(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path.rpartition(".")[0])


def in_model_order(model: nn.Module, placements: Iterable[Placement]) -> tuple[Placement, ...]:
    """By place in the model, parameters of one module by their place in it."""
    modules = {path: number for number, (path, _) in enumerate(model.named_modules())}

    def place(placement: Placement) -> tuple[int, int]:
        if not placement.stacked:
            return modules[placement.path], 0
        names = [name for name, _ in _module(model, placement.path).named_parameters()]
        return modules[placement.parent], names.index(placement.path.rpartition(".")[2])

    return tuple(sorted(placements, key=place))


def adapt_stacked(builder: Builder, path: str, members: Sequence[Placement]) -> None:
    """Take over the forward of the module at `path`, for placements on its parameters."""
    module: Any = builder.model.get_submodule(path)
    inner, outer = projections(module)
    decisions = _decisions(builder, path, module, members)
    banks = {p.path.rpartition(".")[2]: builder.built.banks[p.path] for p in members}

    def projection(name: str) -> StackedProjection:
        return StackedProjection(
            module,
            name,
            transposed=module.is_transposed,
            biased=module.has_bias,
            experts=banks.get(name),
            decision=decisions.get(name),
        )

    glue = MoLoRAStackedExperts(
        module.forward,
        projection(inner),
        projection(outer),
        num_base=module.num_experts,
        num_experts=members[0].num_experts,
        activate=partial(_activate, module),
        finish=partial(_finish, module),
        context=builder.context,
    )
    builder.surgery.set_attribute(module, "forward", glue.forward)


def _decisions(
    builder: Builder, path: str, module: nn.Module, members: Sequence[Placement]
) -> dict[str, Decision]:
    """What decides for each parameter; with scope "linear" and "block" one router reads the hidden
    states for both, since a weight's input is known only where the base has chosen the weight."""
    first = members[0]
    if any(p.group is not first.group for p in members):
        raise AttachError(f"the parameters of {path} are in two groups. Make them one group.")
    if not first.routed:
        return {}
    site: Any = first.group.site
    found: dict[str, Decision] = {}
    shared: Decision | None = None
    for placement in members:
        if site.scope in ("linear", "block"):
            if shared is None:
                shared = builder.site(path, module, members, _width(builder.model, path, module))
            decision = shared
        else:
            decision = builder.decision(placement, module)
        owner = decision if isinstance(decision, RoutingSite) else decision.site
        builder.built.routed_by[placement.path] = owner.name
        found[placement.path.rpartition(".")[2]] = decision
    return found


def _width(model: nn.Module, path: str, module: Any) -> int:
    """H, the features that the module with stacked weights reads."""
    return stacked_features(model, f"{path}.{projections(module)[0]}")[0]


def _activate(module: Any, y_NF: Tensor) -> Tensor:
    a_NI: Tensor = module._apply_gate(y_NF) if module.has_gate else module.act_fn(y_NF)
    return a_NI


def _finish(module: Any, y_NF: Tensor) -> Tensor:
    if not module.has_post_expert_norm:
        return y_NF
    normed: Tensor = module.post_expert_norm(y_NF)
    return normed

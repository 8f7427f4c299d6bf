"""X-LoRA mixtures of package peft: read onto a model, and written so that package peft loads them.

Package peft 0.20 to 0.21.2 loses layers of the classifier when it saves; what is written here has
them all, and gives the same logits there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from molora.attach import Mixture
from molora.compose.compose import compose
from molora.compose.edit import experts_of, imported_form
from molora.compose.experts import FrozenExperts, load_experts
from molora.config import Dense, Softmax, TopK, XLoRA
from molora.errors import AttachError, CheckpointError, ConfigError
from molora.io.formats.xlora import PREFIX, XLoraSettings, read_xlora
from molora.io.formats.xlora import XLora as ReadXLora
from molora.io.peft_files import CONFIG, TENSORS
from molora.io.peft_write import check_free, put_directory, write_adapter
from molora.routing.classifier import HiddenStateClassifier


def compose_xlora(
    model: nn.Module,
    directory: str | Path,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    allow_reinit: bool = False,
    seed: int = 0,
    **options: Any,
) -> Mixture:
    """Put an X-LoRA of package peft, or of its authors' package, on its base.

    Args:
        model: the base.
        directory: with the settings and the classifier.
        adapters: name → directory of each adapter, where they do not lie in `directory`.
        allow_reinit: accept a classifier that lacks layers, which then start anew.
        seed: starts these.
        options: as for `molora.compose`.

    Raises:
        CheckpointError: files that are missing, damaged, incomplete or do not fit each other.
        ConfigError: settings that cannot be, or that are not supported.
        AttachError: adapters or a classifier of another base; the model is then as it was.
    """
    found = read_xlora(Path(directory), adapters=adapters, allow_reinit=allow_reinit)
    experts = load_experts(dict(found.adapters))
    experts = FrozenExperts(experts.adapters, (*experts.notes, *found.notes))
    options = {"missing": "zero", **options}
    router = _router(found.settings, len(found.adapters))
    mixture = compose(model, experts, router=router, seed=seed, **options)
    try:
        _fill(mixture, found)
    except BaseException:
        mixture.detach()
        raise
    return mixture


def _router(settings: XLoraSettings, num_experts: int) -> dict[str, Any]:
    if not settings.enable_relu_and_dropout and settings.xlora_depth > 1:
        raise ConfigError(
            "enable_relu_and_dropout is false: layers of the classifier that follow each other "
            "are one linear layer. Multiply them and set xlora_depth to 1."
        )
    dropout = float(settings.xlora_dropout_p)
    return {
        "kind": "xlora",
        "layerwise": settings.layerwise_scalings,
        "depth": settings.xlora_depth,
        "width": settings.xlora_size,
        # at 1 nothing would pass in training
        "dropout": dropout if dropout < 1 else 0.999,
        "softmax": settings.enable_softmax,
        "temperature": settings.softmax_temperature,
        "top_k": settings.top_k_lora,
        "softmax_top_k": settings.enable_softmax_topk,
        "first_pass_score": settings.scaling_pass_value,
        "gate_scale": settings.global_scaling_weight,
    }


@torch.no_grad()
def _fill(mixture: Mixture, found: ReadXLora) -> None:
    classifier = mixture.built.routers["router"]
    assert isinstance(classifier, HiddenStateClassifier)
    linears = [layer for layer in classifier.layers if isinstance(layer, nn.Linear)]
    placements = mixture.plan.placements
    if found.num_modules not in (None, len(placements)):
        raise AttachError(
            f"{found.source}: the classifier has gates for {found.num_modules} modules, but the "
            f"adapters adapt {len(placements)} linears. They do not belong together."
        )
    for linear, layer in zip(linears, found.layers, strict=True):
        if layer is None:
            continue
        if layer.weight.shape != linear.weight.shape:
            raise AttachError(
                f"{found.source}: a layer of the classifier maps {tuple(layer.weight.shape)[::-1]} "
                f"features, and the base needs {tuple(linear.weight.shape)[::-1]}: it was trained "
                "on another base."
            )
        linear.weight.copy_(layer.weight)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)


def export_xlora(mixture: Mixture, directory: str | Path) -> None:
    """Write a directory that package peft loads to the same logits: X-LoRA's settings, its whole
    classifier, and every adapter below it as "0", "1", …

    Package peft finds adapters by the absolute paths in the settings: after a move it needs them
    changed (`adapters`), molora does not.

    Raises:
        ConfigError: a mixture that package peft cannot run: another router, or experts that it
            would act otherwise with.
        CheckpointError: a directory that is in use or cannot be written.
    """
    directory = Path(directory)
    _check_exportable(mixture)
    check_free(directory)
    experts = experts_of(mixture).adapters.values()
    places = {str(number): directory.resolve() / str(number) for number in range(len(experts))}
    settings = json.dumps(_settings(mixture, places), indent=2)
    prefix = PREFIX.removesuffix("layers.")
    tensors = {
        f"{prefix}{name}": value.detach().cpu().contiguous().clone()
        for name, value in mixture.built.routers["router"].state_dict().items()
        if name.startswith("layers.")
    }

    def write(partial: Path) -> None:
        for number, adapter in enumerate(experts):
            write_adapter(partial / str(number), adapter.modules, base=adapter.base)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(settings + "\n")

    try:
        put_directory(directory, write)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}.") from None


def _check_exportable(mixture: Mixture) -> None:
    """Raise ConfigError for what package peft's X-LoRA cannot do."""
    group = mixture.config.groups[0]
    form = imported_form(mixture.config)
    if not isinstance(group.router, XLoRA):
        raise ConfigError(
            f"the mixture's router is of kind {group.router.kind!r}; only X-LoRA can be exported "
            "as X-LoRA. Export the experts with --to peft-each, or keep molora's own directory."
        )
    for expert in form.experts:
        what = {
            "DoRA, which package peft's X-LoRA refuses": expert.has_magnitude,
            "a bias that its gate would not reach there": expert.has_bias,
            "tokens after which it acts, which package peft would not heed": bool(
                expert.invocation_tokens
            ),
            "stacked weights of the base, which package peft's X-LoRA does not gate": bool(
                form.stacked.keys() & expert.modules.keys()
            ),
        }
        for reason, holds in what.items():
            if holds:
                raise ConfigError(f"expert {expert.name} has {reason}. Leave it out.")
    everywhere = all(p.path in e.modules for p in mixture.plan.placements for e in form.experts)
    if form.missing != "zero" and not everywhere:
        raise ConfigError(
            f"missing={form.missing!r}: package peft loses the gates of experts that lack a "
            "linear, as missing='zero' does. Compose with that."
        )
    if not isinstance(group.select, (Dense, TopK)):
        raise ConfigError(f"package peft's X-LoRA has no selector of kind {group.select.kind!r}.")


def _settings(mixture: Mixture, places: Mapping[str, Path]) -> dict[str, Any]:
    group = mixture.config.groups[0]
    router, select = group.router, group.select
    assert isinstance(router, XLoRA)
    top_k = mixture.plan.placements[0].top_k
    classifier = mixture.built.routers["router"]
    assert isinstance(classifier, HiddenStateClassifier)
    first = classifier.layers[0]
    assert isinstance(first, nn.Linear)
    bases = {expert.base for expert in imported_form(mixture.config).experts if expert.base}
    return {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": bases.pop() if len(bases) == 1 else None,
        "inference_mode": True,
        "adapters": {name: str(path) for name, path in places.items()},
        "hidden_size": first.in_features,
        "layerwise_scalings": router.layerwise,
        "xlora_depth": router.depth,
        "xlora_size": router.width,
        "xlora_dropout_p": router.dropout,
        "enable_softmax": isinstance(group.score, Softmax),
        "softmax_temperature": router.temperature,
        "top_k_lora": top_k if top_k != classifier.num_experts else None,
        "enable_softmax_topk": isinstance(select, TopK) and select.softmax,
        "scaling_pass_value": router.first_pass_score,
        "global_scaling_weight": group.gate_scale,
        "use_trainable_adapters": False,
    }

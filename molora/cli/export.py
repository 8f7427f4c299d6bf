"""``molora export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("auto", "float32", "bfloat16", "float16")


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A saved mixture of LoRAs.")],
    to: Annotated[
        str, typer.Option(metavar="peft|peft-each|peft-xlora|merged", help="What it becomes.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="For peft: how experts are merged, as method=svd rank=16."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where it goes, a new directory: DIR-KIND beside DIR if not given."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model, a directory or a hub name; not needed if the mixture's is a "
            "directory here."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of what is written: auto (peft: float32, merged: as the base), …"),
    ] = "auto",
) -> None:
    """Write a mixture of LoRAs as what other programs read.

    peft-each: a directory for each expert, as it was. peft-xlora: an X-LoRA that package peft
    loads, for router xlora. peft: one LoRA that package peft and servers (vLLM, SGLang, LoRAX)
    load. merged: a plain model. The last two are for fixed weights (router uniform or fixed): a
    mixture that chooses experts for every token is neither. A merged model is written only if its
    logits are the mixture's.

    \b
    Example:
      molora export runs/experts --to peft-each --out exported
      molora export runs/experts --to peft --out exported method=svd rank=16
      molora export runs/experts --to merged --out exported --dtype bfloat16
    """
    from molora.cli.inspect import check_no_run
    from molora.config.base import unknown_name
    from molora.presets.overrides import replaced

    check_no_run(directory)
    if to not in KINDS:
        raise ConfigError(f"--to: {unknown_name('kind', to, list(KINDS))}")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: {unknown_name('dtype', dtype, list(DTYPES))}")
    options = replaced({}, overrides or [])
    if options and to != "peft":
        raise ConfigError(f"{next(iter(options))}=…: only --to peft merges and takes settings.")
    if out is None:
        whole = directory.resolve()
        out = whole.with_name(f"{whole.name}-{to}")
    KINDS[to](directory, out, base, dtype, options)


def _each(directory: Path, out: Path, base: str | None, dtype: str, options: Any) -> None:
    from molora.compose.export import export_each

    if dtype != "auto":
        raise ConfigError("--dtype: peft-each leaves every expert as it is. Leave it out.")
    experts = export_each(directory, out, model=_skeleton(directory, base))
    for name in experts.names:
        typer.echo(f"{name} is in {out / name}")


def _peft(directory: Path, out: Path, base: str | None, dtype: str, options: Any) -> None:
    from typing import get_type_hints

    import torch

    from molora.cli.settings import check_values
    from molora.compose.export import export_one
    from molora.compose.merging import merge
    from molora.compose.servable_rules import servable_faults
    from molora.config.base import unknown_name

    types = get_type_hints(merge)
    known = [name for name in types if name not in NOT_OPTIONS]
    for name in options:
        if name not in known:
            raise ConfigError(unknown_name("setting", name, known))
    check_values("merge", options, types)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    skeleton = _skeleton(directory, base)
    merged, made = export_one(directory, out, model=skeleton, dtype=wanted, **options)
    for note in (*merged.notes, *servable_faults(out)):
        typer.echo(f"note     {note}")
    residual = max(merged.residuals.values(), default=0.0)
    typer.echo(
        f"{len(merged.weights)} experts by {merged.method}, at most {residual:.2g} of an update "
        f"lost, {made.rounding:.2g} by rounding to {wanted!s}"
    )
    typer.echo(f"The LoRA, of rank {made.rank} on {len(made.modules)} linears, is in {out}")


def _xlora(directory: Path, out: Path, base: str | None, dtype: str, options: Any) -> None:
    from molora.attach import load
    from molora.compose.xlora import export_xlora
    from molora.config.run import ModelConfig
    from molora.generate.load import base_name
    from molora.train.loading import load_model

    if dtype != "auto":
        raise ConfigError("--dtype: peft-xlora leaves every expert as it is. Leave it out.")
    name = base_name(directory, base)
    export_xlora(load(load_model(ModelConfig(name=name, dtype="auto")), directory), out)
    typer.echo(f"The X-LoRA is in {out}")
    typer.echo("Package peft finds its adapters by the paths in its adapter_config.json.")


def _merged(directory: Path, out: Path, base: str | None, dtype: str, options: Any) -> None:
    import torch

    from molora import io
    from molora.compose.export import export_merged, static_weights
    from molora.config.run import ModelConfig
    from molora.generate.load import base_name
    from molora.train.loading import load_model, load_tokenizer, stored_dtype

    static_weights(io.read_manifest(directory).mixture)
    config = ModelConfig(name=base_name(directory, base), dtype="float32")
    wanted = stored_dtype(config) if dtype == "auto" else getattr(torch, dtype)
    tokenizer = load_tokenizer(config)
    model = load_model(config)
    made = export_merged(model, directory, out, tokenizer=tokenizer, dtype=wanted)
    typer.echo(
        f"logits differ by {made.difference:.1e} of their norm in float32, and by "
        f"{made.rounding:.1e} in {made.dtype}"
    )
    typer.echo(f"The model, with {made.linears} merged linears, is in {out}")


KINDS = {"peft": _peft, "peft-each": _each, "peft-xlora": _xlora, "merged": _merged}
NOT_OPTIONS = ("experts", "weights", "missing", "return")


def _skeleton(directory: Path, base: str | None) -> nn.Module | None:
    """The base without its weights, where it is named or a directory here."""
    from molora import io
    from molora.config.run import ModelConfig
    from molora.train.loading import load_skeleton

    name = base or io.read_manifest(directory).base.name
    if base is None and not Path(name).is_dir():
        return None
    return load_skeleton(ModelConfig(name=name))

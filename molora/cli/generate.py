"""``molora generate`` and ``molora chat``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.cli.inspect import check_no_run
from molora.errors import MoLoRAError

if TYPE_CHECKING:
    from molora.generate import Loaded
    from molora.generate.text import Deciding

Adapter = Annotated[
    Path, typer.Option(metavar="DIR", help="Directory with a saved mixture.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The base model, a directory or a hub name; not needed if the one that the mixture "
        "was trained on is a directory here."
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Of the base: auto (as stored), float32, bfloat16 or float16.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to write at most.")]
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")
]
TopP = Annotated[
    float, typer.Option(help="Draw from the fewest tokens whose probabilities reach this sum.")
]
Seed = Annotated[int, typer.Option(help="Seeds the draws.")]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|PACKAGE",
        help="The encoder that the mixture's text router was made with, if it has one.",
    ),
]


def generate(
    adapter: Adapter,
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="What to continue; may be given repeatedly.")
    ],
    model: Model = None,
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    num_beams: Annotated[int, typer.Option(help="Beams to search; 1 is none.")] = 1,
    seed: Seed = 0,
    chat_template: Annotated[
        str, typer.Option(help="auto: as a user's turn, if the tokenizer can; none: as it stands.")
    ] = "auto",
    encoder: Encoder = None,
) -> None:
    """Continue prompts with a trained mixture.

    One prompt gives its continuation alone; several give each prompt, marked by "> ", in front of
    its own.

    \b
    Example:
      molora generate --adapter runs/mola/adapter --prompt "What is a mixture of experts?"
    """
    from molora.config.base import unknown_name
    from molora.errors import ConfigError

    if chat_template not in ("auto", "none"):
        raise ConfigError(unknown_name("chat template", chat_template, ["auto", "none"]))
    loaded, deciding = _load(adapter, model, dtype, encoder, num_beams=num_beams)
    from molora.generate import generate_texts

    texts = generate_texts(
        loaded,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        num_beams=num_beams,
        seed=seed,
        chat_template=chat_template,  # type: ignore[arg-type]  # checked above
        deciding=deciding,
    )
    for asked, text in zip(prompt, texts, strict=True):
        if len(prompt) > 1:
            typer.echo(f"> {asked}")
        typer.echo(text)


def chat(
    adapter: Adapter,
    model: Model = None,
    dtype: Dtype = "auto",
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    encoder: Encoder = None,
) -> None:
    """Talk with a trained mixture, a line at a time.

    The conversation goes on until the end of the input (Ctrl-D); /new starts another one.

    \b
    Example:
      molora chat --adapter runs/mola/adapter --temperature 0.7 --top-p 0.9
    """
    loaded, deciding = _load(adapter, model, dtype, encoder)
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "deciding": deciding,
    }
    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    while (line := _read_line()) is not None:
        if line == "/new":
            messages = list(beginning)
        elif line:
            messages = _turn(loaded, [*messages, {"role": "user", "content": line}], settings)


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        typer.echo()
        return None


def _turn(
    loaded: Loaded, messages: list[dict[str, str]], settings: dict[str, Any]
) -> list[dict[str, str]]:
    """The conversation with the model's answer, which is printed while it is written.

    Where the last message cannot be answered, the conversation without it.
    """
    from molora.generate import generate_texts

    try:
        (answer,) = generate_texts(
            loaded, [messages], on_text=lambda text: typer.echo(text, nl=False), **settings
        )
    except MoLoRAError as error:
        if len(messages) == 1:
            raise  # nothing can be said at all, as without a chat template
        typer.echo(f"Error: {error}", err=True)
        return messages[:-1]
    typer.echo()
    return [*messages, {"role": "assistant", "content": answer}]


def _load(
    adapter: Path, model: str | None, dtype: str, encoder: str | None, *, num_beams: int = 1
) -> tuple[Loaded, Deciding | None]:
    from transformers.utils import logging

    from molora.cli.text_routing import text_router_of
    from molora.generate import load_for_generation

    check_no_run(adapter)
    # on a terminal the answer is the output, and a bar for every file is not
    logging.disable_progress_bar()
    router = text_router_of(adapter, encoder, num_beams=num_beams)
    loaded = load_for_generation(adapter, model=model, dtype=dtype)
    if router is None:
        return loaded, None
    return loaded, router.deciding(loaded.mixture, loaded.tokenizer)

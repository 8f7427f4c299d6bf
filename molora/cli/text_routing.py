"""Gates from texts on the command line: text routers that are read, and what they decide by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.cli.experts import harmless
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.compose.text_router import TextRouter
    from molora.config import MixtureConfig


def is_given(config: MixtureConfig) -> bool:
    """Whether gates come with every batch."""
    return any(group.router.kind == "given" for group in config.groups)


def text_router_of(
    directory: Path, encoder: str | None, *, num_beams: int = 1
) -> TextRouter | None:
    """The text router that was saved with a mixture, for its experts; None if it needs none.

    Raises:
        ConfigError: a mixture that needs gates and none can be made; an encoder that is not
            needed, or is another one; beams with gates that are renewed.
        CheckpointError: damaged files.
    """
    from molora import io
    from molora.compose.edit import imported_form
    from molora.compose.text_router import has_text_router, load_text_router, read_text_router

    config = io.read_manifest(directory).mixture
    if not is_given(config):
        if encoder is not None:
            raise ConfigError(
                f"--encoder: the mixture in {directory} (method {config.method!r}) decides by "
                "itself. Leave it out."
            )
        return None
    if not has_text_router(directory):
        raise ConfigError(
            f"the mixture in {directory} takes its gates with every batch, and no text router is "
            "saved with it that could make them. Make one, e.g. with molora compose --from "
            f"{directory} --router retriever --encoder DIR --samples NAME=FILE --out DIR, or give "
            "gates in Python: mixture.context(expert_gates=…)."
        )
    stored = read_text_router(directory)
    if num_beams > 1 and stored.every is not None:
        raise ConfigError(
            f"--num-beams {num_beams}: this mixture's gates are renewed while text is written, and "
            "the texts of beams change places. Leave it out."
        )
    if encoder is None:
        made_with = stored.encoder
        raise ConfigError(
            f"the text router in {directory} reads texts by the encoder "
            f"{harmless(made_with.name)[:200]} ({made_with.sha256[:12]}), which is not stored with "
            "it. Give its directory, or the package that contains it: --encoder DIR."
        )
    router = load_text_router(directory, load_encoder(encoder))
    return router.ordered(imported_form(config).names)


def load_encoder(source: str) -> Any:
    """The encoder, where models compute."""
    import torch

    from molora.compose.encoder import TextEncoder

    return TextEncoder.load(source, device="cuda" if torch.cuda.is_available() else "cpu")


def unknown_to_text_router(directory: Path, names: Sequence[str]) -> list[str]:
    """Those of `names` that the text router saved there cannot choose."""
    from molora.compose.text_router import read_text_router

    known = read_text_router(directory).names
    return [name for name in names if name not in known]


def text_router_lines(directory: Path, config: MixtureConfig) -> list[str]:
    """What `molora inspect` says of the text router that is saved with a mixture."""
    from molora.cli.experts import shown_settings
    from molora.compose.edit import imported_form
    from molora.compose.text_router import has_text_router, read_text_router

    if not is_given(config):
        return []
    if not has_text_router(directory):
        return ["texts    no text router; gates come from whoever calls the model"]
    found = read_text_router(directory)
    how = getattr(found.decides, "weights", None) or getattr(found.decides, "select", None)
    times = "the prompt's gates stay"
    if found.every is not None:
        times = f"gates renewed after every {found.every} tokens"
        times = "gates renewed after every token" if found.every == 1 else times
    encoder = f"{harmless(found.encoder.name)[:200]} ({found.encoder.sha256[:12]})"
    lines = [
        f"texts    {found.decides.kind}, {shown_settings(how)}; {times}",
        f"encoder  {encoder}, to be given with --encoder",
    ]
    if lacking := unknown_to_text_router(directory, imported_form(config).names):
        lines.append(f"lacking  the text router does not know {', '.join(lacking)}")
    return lines

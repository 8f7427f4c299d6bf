"""A whole run: data, model, mixture, training and what it leaves behind."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from molora import __version__
from molora.attach import Mixture
from molora.config import Imported
from molora.config.run import RunConfig
from molora.config.saved import FROM, REPLACED, saved_config
from molora.config.yaml import parse_yaml
from molora.data import Tokenized
from molora.errors import ConfigError
from molora.io.native import check_writable
from molora.train import checkpointing, trackers
from molora.train.deepspeed_config import OUTPUT as ENGINE
from molora.train.deepspeed_config import deepspeed_config
from molora.train.dry_run import describe
from molora.train.loading import load_model, load_tokenizer
from molora.train.metrics import MetricsWriter, measured
from molora.train.mixin import ADAPTER
from molora.train.objectives import make_trainer, tokenized
from molora.train.progress import ProgressDisplay
from molora.train.start import attached
from molora.train.startup import WaitLimit, joined

if TYPE_CHECKING:
    from molora.train.dpo import DPOTrainer
    from molora.train.trainer import SFTTrainer

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
_LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors")


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    output_dir: Path
    """Holds adapter/ (the mixture), config.yaml (everything spelt out), and metrics.jsonl."""
    metrics: dict[str, float]
    """Of the whole run: train_loss, and with data.eval eval_loss, a mean over supervised tokens."""
    seconds: float
    """Time in the training loop, evaluations between its steps included."""
    tokens: int
    """Tokens trained on, padding not counted."""
    mixture: Mixture
    model: nn.Module
    """The adapted model, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase


def train(
    config: RunConfig, *, progress: bool = True, resume: str | Path | None = None
) -> TrainResult:
    """Train a mixture and write it to ``output_dir/adapter``, complete or not at all.

    The same configuration gives the same mixture, bit for bit on a CPU with the same number of
    threads.

    Args:
        config: the run, e.g. `molora.load_config(path)`.
        progress: show it on the terminal (stderr).
        resume: a checkpoint to go on from; "auto" for the newest complete one of output_dir, or
            the beginning if there is none.

    Raises:
        ConfigError: a model that cannot be loaded, settings that do not fit it.
        DataError: rows that cannot be trained on, or that lack a column that the mixture needs.
        AttachError: targets that do not fit the model.
        CheckpointError: an output directory whose adapter/ is a file.
        TrainingError: processes that were not all started with this run, or that went away.
    """
    adapter = config.output_dir / ADAPTER
    check_writable(adapter)
    trackers.check_installed(config.train.report_to)
    with joined(config) as peers, _threads(config.train.threads):
        tokenizer = load_tokenizer(config.model)
        data = tokenized(config, tokenizer)
        wait = config.train.timeout_seconds
        peers.agree(_counts(data), what="data", seconds=wait, setting="train.timeout_seconds")
        engine = deepspeed_config(config, world_size=peers.size)
        model = load_model(config.model, engine=engine)
        base_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        mixture = attached(config, model)
        table = describe(mixture, model=config.model.name, base_parameters=base_parameters)
        writer = MetricsWriter(config.output_dir / METRICS)
        with _left_as_found(model), ProgressDisplay(quiet=not progress) as display:
            trainer = _trainer(config, mixture, tokenizer, data)
            trainer.add_callback(_ConfigWriter(config, engine))
            trainer.add_callback(writer)
            trainer.observation.listeners.append(writer.on_report)
            trainer.add_callback(display)
            trainer.add_callback(WaitLimit(config.train.timeout_seconds))
            if trainer.is_world_process_zero():
                display.show_run(data, table, engine=engine)
            metrics, seconds = _run(trainer, resume)
            trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        summary = {
            "tokens": trainer.tokens,
            "training_seconds": round(seconds, 3),
            **metrics,
            **_about(data, mixture),
        }
        writer.write("summary", trainer.state.global_step, summary)
    return TrainResult(
        config.output_dir, metrics, seconds, trainer.tokens, mixture, model, tokenizer
    )


def as_yaml(config: RunConfig) -> str:
    """A configuration with presets and defaults spelt out; `molora.load_config` reads it back.

    Experts that were trained elsewhere have a line for every linear, thousands for a library: they
    are named by the directory that the run starts from.
    """
    data = config.model_dump(mode="json")
    data["mixture"] = _by_reference(config) or data["mixture"]
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    assert RunConfig.parse(parse_yaml(text)) == config
    return text


def _by_reference(config: RunConfig) -> dict[str, Any] | None:
    """`from` and what differs, where the mixture is that of `train.start_from`."""
    start = config.train.start_from
    composed = any(isinstance(group.expert, Imported) for group in config.mixture.groups)
    if start is None or not composed:
        return None
    try:
        saved = saved_config(start)
    except ConfigError:
        return None  # it may have gone meanwhile; what was read of it is spelt out
    own = {name: getattr(config.mixture, name) for name in REPLACED}
    if saved.model_copy(update=own) != config.mixture:
        return None
    dumped = config.mixture.model_dump(mode="json")
    return {FROM: str(start), **{name: dumped[name] for name in REPLACED}}


class _Dumper(yaml.SafeDumper):
    """Strings are always quoted: what is a word to one YAML reader is a number to another."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isidentifier() else '"'
    ),
)


class _ConfigWriter(TrainerCallback):
    """Writes what a run was started with, once it begins: one that is refused leaves the files of
    the run before alone."""

    def __init__(self, config: RunConfig, engine: dict[str, Any] | None) -> None:
        self.config, self.engine = config, engine

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        directory = self.config.output_dir
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).write_text(as_yaml(self.config), encoding="utf-8")
        if self.engine is not None:
            (directory / ENGINE).write_text(json.dumps(self.engine, indent=2) + "\n", "utf-8")


def _trainer(
    config: RunConfig, mixture: Mixture, tokenizer: PreTrainedTokenizerBase, data: Tokenized
) -> SFTTrainer | DPOTrainer:
    trainer = make_trainer(
        config,
        mixture.model,
        tokenizer,
        mixture=mixture,
        router_learning_rate=config.train.router_learning_rate,
        lora_plus_ratio=config.train.lora_plus_ratio,
        weight_decay_B=config.train.weight_decay_B,
        router_weight_decay=config.train.router_weight_decay,
        dead_steps=config.train.dead_steps,
        train_dataset=data.train,
        eval_dataset=data.eval,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _run(
    trainer: SFTTrainer | DPOTrainer, resume: str | Path | None
) -> tuple[dict[str, float], float]:
    started = time.perf_counter()
    metrics = {"train_loss": trainer.train(resume).metrics["train_loss"]}
    seconds = time.perf_counter() - started
    if trainer.eval_dataset is not None:
        best = trainer.args.load_best_model_at_end and trainer.state.best_global_step
        evaluated = [
            line
            for line in trainer.state.log_history
            if "eval_loss" in line and line["step"] == (best or trainer.state.global_step)
        ]
        found = evaluated[-1] if evaluated else trainer.evaluate()
        metrics |= {k: v for k, v in measured(found).items() if k.startswith("eval_")}
    return metrics, seconds


def _about(data: Tokenized, mixture: Mixture) -> dict[str, Any]:
    return {
        "parameters": mixture.num_parameters(),
        "data": {**_counts(data), "tasks": list(data.tasks)},
        "versions": {
            "molora": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
    }


def _counts(data: Tokenized) -> dict[str, Any]:
    rates = data.packing
    packing = {} if rates is None else {"packing": {**asdict(rates), "fill": rates.fill}}
    return {
        **packing,
        "train": asdict(data.train_counts),
        "eval": asdict(data.eval_counts) if data.eval_counts else None,
    }


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _left_as_found(model: Any) -> Iterator[None]:
    """Take back what trainers change on a model that is used on: mode, cache, forward."""
    use_cache = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = use_cache
        checkpointing.disable(model)
        # TRL hides the model's forward behind one with a fused head
        model.__dict__.pop("forward", None)
        model.eval()

"""Sources that are mixed by weight, from their files to the batches of every epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_models import tiny
from tiny_runs import ROWS, lines, tokenizer, write_rows
from trl import SFTConfig

import molora
from molora.config.data import DataConfig
from molora.data import Collator, Tokenized, tokenize
from molora.train import SFTTrainer
from molora.train.run import train

MOLA = {"preset": "mola", "num_experts": 4, "rank": 3}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Six rows of cluster 0, of which an epoch has two, and two of cluster 1 thrice each."""
    Dataset.from_list(ROWS[:6]).save_to_disk(tmp_path / "saved")
    saved = {"name": str(tmp_path / "saved"), "cluster_ids": 0, "weight": 1}
    rows = write_rows(tmp_path / "clustered.jsonl", [{**row, "cluster_ids": 1} for row in ROWS[6:]])
    return DataConfig.parse({"train": [saved, {"path": str(rows), "weight": 3}]})


def seen_in_two_epochs(tokenized: Tokenized, directory: Path) -> list[tuple[int, ...]]:
    """(cluster, *tokens) of every example, in the order in which the model gets them."""
    mixture = molora.attach(tiny("llama"), molora.presets.mola(num_experts=4, rank=2, losses=()))
    trainer = SFTTrainer(
        mixture.model,
        SFTConfig(
            output_dir=str(directory),
            per_device_train_batch_size=4,
            num_train_epochs=2,
            save_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to=[],
            bf16=False,
            use_cpu=True,
        ),
        mixture=mixture,
        train_dataset=tokenized.train,
        processing_class=tokenizer(),
        data_collator=Collator(pad_token_id=2),
    )
    seen: list[tuple[int, ...]] = []

    def look(module: object, args: object, batch: dict) -> None:
        for ids, mask, cluster in zip(
            batch["input_ids"], batch["attention_mask"], batch["cluster_ids"], strict=True
        ):
            seen.append((cluster.item(), *ids[mask.bool()].tolist()))

    mixture.model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    trainer.train()
    return seen


def test_every_epoch_has_the_shares_and_the_mixture_gets_the_clusters(data, tmp_path):
    tokenized = tokenize(data, tokenizer(), seed=3)

    seen = seen_in_two_epochs(tokenized, tmp_path)

    columns = zip(tokenized.train["cluster_ids"], tokenized.train["input_ids"], strict=True)
    drawn = Counter((cluster, *ids) for cluster, ids in columns)
    first, second = seen[:8], seen[8:]
    assert Counter(first) == Counter(second) == drawn
    assert first != second  # another order
    assert Counter(cluster for cluster, *_ in first) == {0: 2, 1: 6}
    assert sorted(drawn.values()) == [1, 1, 3, 3]
    assert seen_in_two_epochs(tokenized, tmp_path) == seen


def test_a_run_draws_by_its_seed(data, run_file: Callable[..., Path]) -> None:
    settings = data.model_dump(mode="json", exclude_defaults=True)
    losses = []
    for seed in (0, 0, 1):
        path = run_file(MOLA, data=settings, seed=seed)
        train(molora.load_config(path), progress=False)
        (summary,) = lines(path.parent / "out" / "metrics.jsonl", "summary")
        assert summary["data"]["train"]["examples"] == 8
        losses.append(summary["train_loss"])
    assert losses[0] == losses[1] != losses[2]

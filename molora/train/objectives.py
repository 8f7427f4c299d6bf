"""What a run's objective decides: what rows become, and which trainer trains on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from molora.attach.losses import required_columns
from molora.config import MixtureConfig
from molora.config.allocation import smallest
from molora.config.objective import DPO
from molora.config.run import RunConfig
from molora.data import Collator, Tokenized, padding_id, per_sequence, tokenize
from molora.data.preference import tokenize_pairs
from molora.errors import DataError

if TYPE_CHECKING:
    from molora.train.dpo import DPOTrainer
    from molora.train.trainer import SFTTrainer


def tokenized(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Tokenized:
    """The rows of a run as tokens: answers to learn, or pairs to compare.

    Raises:
        DataError: rows of another kind than the objective needs, see `molora.data.tokenize`, or
            without a column that an auxiliary loss reads.
    """
    objective = config.train.objective
    if not isinstance(objective, DPO):
        data = tokenize(config.data, tokenizer, seed=config.seed)
    else:
        data = tokenize_pairs(config.data, tokenizer, seed=config.seed)
        if not objective.aux_losses:
            return data
    check_columns(config.mixture, data)
    return data


def check_columns(mixture: MixtureConfig, data: Tokenized) -> None:
    """Raise DataError unless the training rows have the columns that the mixture's losses read."""
    for name in required_columns(mixture):
        last, what = _largest(name, mixture)
        if name not in data.train.column_names:
            raise DataError(
                f"data.train has no column `{name}`, which the auxiliary loss of "
                f"{mixture.method!r} needs: {what}, one for every row. Add it to the rows, set "
                f"`{name}` on each source of data.train, or turn the loss off with losses: []."
            )
        values = sorted(set(per_sequence(data.train, name)))
        if values[0] < 0 or values[-1] > last:
            wrong = [value for value in values if not 0 <= value <= last]
            raise DataError(
                f"column `{name}` of data.train has the values {wrong[:6]}, but for the "
                f"auxiliary loss of {mixture.method!r} use {what}."
            )


def _largest(column: str, mixture: MixtureConfig) -> tuple[int, str]:
    """The largest value of a column that a loss reads, and what its values are."""
    if column == "task_types":
        return 1, "0 and 1, its two types"
    experts = min(smallest(group.num_experts) for group in mixture.groups if group.routed)
    return experts - 1, f"0 to {experts - 1}, the numbers of the experts"


def make_trainer(
    config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerBase, **keywords: Any
) -> SFTTrainer | DPOTrainer:
    """The trainer of a run; `keywords` go to it as they are."""
    # here: a preview needs the rows, and no trainer
    import trl

    from molora.train.arguments import trainer_arguments

    arguments, objective = trainer_arguments(config), config.train.objective
    if isinstance(objective, DPO):
        from molora.train.dpo import DPOTrainer

        return DPOTrainer(
            model,
            # rows have been cut already
            trl.DPOConfig(
                **arguments, beta=objective.beta, loss_type=[objective.loss], max_length=None
            ),
            aux_losses=objective.aux_losses,
            processing_class=tokenizer,
            **keywords,
        )
    from molora.train.trainer import SFTTrainer

    return SFTTrainer(
        model,
        trl.SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        data_collator=Collator(padding_id(tokenizer)),
        processing_class=tokenizer,
        **keywords,
    )

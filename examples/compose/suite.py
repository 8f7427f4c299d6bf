"""The suite: rows of five tasks, mixed, and a model of which only the layers with adapters are run.

The experts adapt the upper layers alone. What the layers below make of a text is then the same for
every expert and router: it is computed once per row and kept, which changes no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from molora.config.data import DataSource
from molora.data import IGNORED, RowEncoder, read

HERE = Path(__file__).resolve().parent
TASKS = {
    **{
        name: HERE.parent / "data" / name
        for name in ("language", "noun_class", "python_module", "sms_spam")
    },
    "signature": HERE / "signature",
}
"""Task → directory of its rows."""
TRAIN, VALIDATION, TEST = 200, 50, 100
"""Rows of a task: the first of train.jsonl, the rest of it, and test.jsonl."""
ADAPTED = 8
"""Layers, counted from the last, that have adapters."""
BATCH = 20


@dataclass(frozen=True, eq=False)
class Example:
    """One row, tokenised, with the state that enters the first adapted layer."""

    task: str
    prompt: str
    ids: list[int]
    """Tokens up to the last but one that is supervised."""
    targets: list[int]
    """What each of them predicts; -100 where it is not supervised."""
    choices: tuple[int, ...]
    """First tokens of the answers to choose from; empty where the answer is free."""
    state_SH: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples, padded on the left."""

    state_BSH: Tensor
    mask_BS: Tensor
    targets_BK: Tensor
    """What the last K positions predict, or -100."""


class UpperLayers:
    """A causal language model that starts at layer `first`.

    Args:
        model: of transformers, with its decoder layers in `model.model.layers`; it is changed.
        first: the first layer that is run.
    """

    def __init__(self, model: Any, first: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers = model.model.layers
        self.lower = list(self.layers[:first])
        self._skip()

    def _skip(self) -> None:
        for number in range(len(self.lower)):
            self.layers[number] = Skipped()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model is complete."""
        for number, layer in enumerate(self.lower):
            self.layers[number] = layer
        try:
            yield
        finally:
            self._skip()

    @torch.no_grad()
    def states(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Tokens of N rows → (S, H) each, the input of the first layer that is run."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            kept.append(arguments[0] if arguments else named["hidden_states"])

        found: list[Tensor | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        hook = self.layers[len(self.lower)].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with self.whole():
                for start in range(0, len(rows), BATCH):
                    part = order[start : start + BATCH]
                    kept.clear()
                    ids_BS = _right_padded([rows[i] for i in part])
                    self.model.model(input_ids=ids_BS, use_cache=False)
                    for i, state_SH in zip(part, kept[0], strict=True):
                        found[i] = state_SH[: len(rows[i])].clone()
        finally:
            hook.remove()
        return [state for state in found if state is not None]

    def logits(self, batch: Batch) -> Tensor:
        """(B, K, V) float32, of the last K positions."""
        logits_BKV: Tensor = self.model(**arguments(batch), use_cache=False).logits
        return logits_BKV.float()


def arguments(batch: Batch, *, loss: bool = False) -> dict[str, Any]:
    """What a model of transformers takes to give the last K logits, and with `loss` their loss."""
    length, answers = batch.mask_BS.shape[1], batch.targets_BK.shape[1]
    found = {
        "inputs_embeds": batch.state_BSH,
        "attention_mask": batch.mask_BS,
        "position_ids": (batch.mask_BS.cumsum(dim=1) - 1).clamp_min(0),
        # a number would be a view, of which the head makes a product per row
        "logits_to_keep": torch.arange(length - answers, length),
    }
    # targets are what each position predicts: nothing is left to be shifted
    labels = {"labels": batch.targets_BK, "shift_labels": batch.targets_BK} if loss else {}
    return {**found, **labels}


def _right_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, S): in a causal model, what stands behind a row changes nothing in it."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


class Skipped(nn.Module):
    """A decoder layer that is not run."""

    def forward(self, hidden_states: Tensor, **_ignored: Any) -> Tensor:
        """(B, S, H) as it is."""
        return hidden_states


def load_rows(task: str, split: str, rows: int | None = None) -> list[Any]:
    """Rows of a split of a task, or the first so many; "validation" is the end of train.jsonl."""
    file = "test" if split == "test" else "train"
    found = list(read(DataSource(path=TASKS[task] / f"{file}.jsonl")))
    part = {
        "train": found[:TRAIN],
        "validation": found[TRAIN : TRAIN + VALIDATION],
        "test": found[:TEST],
    }[split]
    return part[:rows]


def load_examples(
    upper: UpperLayers, tokenizer: Any, split: str, rows: int | None = None
) -> list[Example]:
    """The rows of all tasks, task by task."""
    found = [(task, row) for task in TASKS for row in load_rows(task, split, rows)]
    encode = RowEncoder(tokenizer, max_length=2**31)
    encoded = [encode(row)[-1] for _, row in found]
    ends = [max(i for i, t in enumerate(e.labels) if t != IGNORED) for e in encoded]
    inputs = [e.input_ids[:end] for e, end in zip(encoded, ends, strict=True)]
    targets = [e.labels[1 : end + 1] for e, end in zip(encoded, ends, strict=True)]
    states = upper.states(inputs)
    return [
        Example(task, row.prompt, ids, labels, _choices(row, tokenizer, labels), state_SH)
        for (task, row), ids, labels, state_SH in zip(found, inputs, targets, states, strict=True)
    ]


def _choices(row: Any, tokenizer: Any, targets: Sequence[int]) -> tuple[int, ...]:
    """The right answer first."""
    if row.choices is None:
        return ()
    others = [choice for choice in row.choices if choice != row.label]
    tokens = [tokenizer(choice)["input_ids"][0] for choice in (row.label, *others)]
    assert tokens[0] == next(t for t in targets if t != IGNORED)
    return tuple(tokens)


def collate(examples: Sequence[Example]) -> Batch:
    """One batch, padded on the left so that all answers end together."""
    longest = max(len(e.ids) for e in examples)
    supervised = max(sum(t != IGNORED for t in e.targets) for e in examples)
    state_BSH = examples[0].state_SH.new_zeros(len(examples), longest, len(examples[0].state_SH[0]))
    mask_BS = torch.zeros(len(examples), longest, dtype=torch.long)
    targets_BK = torch.full((len(examples), supervised), IGNORED)
    for b, example in enumerate(examples):
        state_BSH[b, longest - len(example.ids) :] = example.state_SH
        mask_BS[b, longest - len(example.ids) :] = 1
        last = torch.tensor(example.targets[-supervised:])
        targets_BK[b, supervised - len(last) :] = last
    return Batch(state_BSH, mask_BS, targets_BK)


def row_losses(logits_BKV: Tensor, targets_BK: Tensor) -> Tensor:
    """(B,): negative log-likelihood of each row's answer, in nats per token."""
    nll_BK = functional.cross_entropy(
        logits_BKV.transpose(1, 2), targets_BK, ignore_index=IGNORED, reduction="none"
    )
    return nll_BK.sum(dim=1) / (targets_BK != IGNORED).sum(dim=1)


def batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Numbers of the examples, in batches of about equal answers and lengths."""
    supervised = [sum(t != IGNORED for t in e.targets) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (supervised[i], len(examples[i].ids)))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model makes of the suite's N rows.

    Attributes:
        loss_N: of each row's answer, in nats per token.
        right_N: 1 where the right choice is the most likely, 0 elsewhere, NaN without choices.
        own_N: share of the gates, over linears and tokens, of the row's own expert; NaN without
            a mixture.
    """

    loss_N: Tensor
    right_N: Tensor
    own_N: Tensor


@torch.no_grad()
def score(
    upper: UpperLayers, examples: Sequence[Example], mixture: Any = None, gates: Any = None
) -> Scores:
    """Losses and hits of every row.

    Args:
        upper: the model, with or without a mixture on it.
        examples: N of them.
        mixture: the mixture that is on it.
        gates: (numbers of the examples of a batch, its number of positions) → gates (B, E), or
            (B, S, E) padded as `collate` does, for a router of kind "given".
    """
    loss_N, right_N, own_N = (torch.full((len(examples),), torch.nan).double() for _ in range(3))
    for part in batches(examples):
        chosen = [examples[i] for i in part]
        batch = collate(chosen)
        columns = {} if gates is None else {"expert_gates": gates(part, batch.mask_BS.shape[1])}
        if mixture is None:
            logits_BKV = upper.logits(batch)
        else:
            with mixture.context(**columns), mixture.record() as records:
                logits_BKV = upper.logits(batch)
            own_N[part] = own_shares(records.values(), chosen, batch.mask_BS)
        loss_N[part] = row_losses(logits_BKV, batch.targets_BK).double()
        for i, example, logits_KV, targets_K in zip(
            part, chosen, logits_BKV, batch.targets_BK, strict=True
        ):
            if example.choices:
                first = int((targets_K != IGNORED).nonzero()[0, 0])
                right_N[i] = float(logits_KV[first, list(example.choices)].argmax() == 0)
    return Scores(loss_N, right_N, own_N)


def own_shares(records: Iterable[Any], examples: Sequence[Example], mask_BS: Tensor) -> Tensor:
    """(B,) float64: |gate| of the expert named as the row's task ÷ Σ |gates|, over all linears and
    the tokens that are no padding; experts are in the order of the tasks."""
    owner_B = torch.tensor([list(TASKS).index(e.task) for e in examples])
    own_B, all_B = torch.zeros(2, len(examples), dtype=torch.float64)
    for record in records:
        gates_BSE = record.dense_gates().double().abs().view(*mask_BS.shape, -1)
        gates_BE = (gates_BSE * mask_BS[..., None]).sum(dim=1)
        own_B += gates_BE.gather(1, owner_B[:, None])[:, 0]
        all_B += gates_BE.sum(dim=1)
    return own_B / all_B

"""Who takes part: for each router, how it is made from the experts and what it may see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import molora
from examples.compose import suite
from examples.compose.suite import Example, Scores, UpperLayers
from examples.compose.train_experts import fit
from molora.compose.centroids import build_centroids
from molora.compose.classifier import train_classifier
from molora.compose.encoder import TextEncoder
from molora.compose.gate_vectors import mean_activations, train_gate_vectors
from molora.compose.retrieval import (
    GateFunction,
    Retriever,
    SoftmaxWeights,
    TopKMean,
    Weights,
    token_gates,
)
from molora.compose.search import penalized, search

SHOTS = 5
"""Validation rows of each task that LoraHub's search sees."""
GATE_BATCH = 4
MEAN_ROWS = 10
"""Rows whose mean input is an expert's vector, as in the code of 2405.11157."""
SCALES = (1.0, 2.0, 3.0, 5.0)
SETTINGS: tuple[tuple[int | str, float], ...] = (
    *((k, 1.0) for k in (1, 2, 3, "all")),
    *((k, 0.3) for k in (3, "all")),
)
"""Pairs of top_k and temperature."""


@dataclass(frozen=True)
class Effort:
    """How long what is searched or trained may take."""

    tried_weights: int = 40
    """By LoraHub's search; its authors' number."""
    gate_steps: int = 50
    """PHATGOOSE's for each expert, of 4 rows; its authors take 100 of 1024."""
    router_rows: int = 64
    """Training rows of each task that a learned router sees, once."""
    tried_settings: int | None = None
    """Of those to choose from; None: all."""


@dataclass(frozen=True, eq=False)
class Bench:
    """What entrants are made from.

    Attributes:
        upper: the base model.
        tokenizer: its tokenizer.
        experts: the set, one per task, in the order of the suite's tasks.
        train, validation, test: rows of all tasks.
        encoder_directory: of a text encoder.
        effort: what may be spent.
    """

    upper: UpperLayers
    tokenizer: Any
    experts: molora.FrozenExperts
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    encoder_directory: Any
    effort: Effort = Effort()

    @cached_property
    def encoder(self) -> TextEncoder:
        """Reads texts for the routers that go by them."""
        return TextEncoder.load(self.encoder_directory)

    def samples(self, text: Callable[[Example], str]) -> dict[str, list[str]]:
        """Expert → texts of its own training rows."""
        found: dict[str, list[str]] = {name: [] for name in self.experts.names}
        for example in self.train:
            found[example.task].append(text(example))
        return found

    @contextmanager
    def composed(self, router: Any, **options: Any) -> Iterator[Any]:
        """The experts on the model with a router, inside."""
        mixture = molora.compose(self.upper.model, self.experts, router=router, **options)
        self.upper.model.eval()
        try:
            yield mixture
        finally:
            mixture.detach()


Score = Callable[[list[Example]], Scores]
Gates = Callable[[Bench, list[Example]], Callable[[list[int], int], Tensor]]


@dataclass(frozen=True)
class Entrant:
    """One line of the table.

    Attributes:
        name: how it is called.
        sees: what it is made from beside the experts.
        router: as `molora.compose` takes it, or what makes it; None: no experts at all.
        options: further arguments of `molora.compose`.
        gates: for a router of kind "given": makes the gates of examples.
        learning_rate: trains the router.
        grid: what to choose from on validation rows, each a change of `router`; or learning rates.
    """

    name: str
    sees: str
    router: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    gates: Gates | None = None
    learning_rate: float | None = None
    grid: tuple[Mapping[str, Any] | float, ...] = ()

    def changed(self, change: Mapping[str, Any] | float) -> Entrant:
        """The entrant with one of the settings of its grid."""
        if isinstance(change, float):
            return replace(self, learning_rate=change)
        return replace(self, router={**self.router, **change})

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Score]:
        """Make it; inside, it scores examples."""
        if self.router is None:
            yield lambda examples: suite.score(bench.upper, examples)
            return
        router = self.router(bench) if callable(self.router) else self.router
        with bench.composed(router, **self.options) as mixture:
            if self.learning_rate is not None:
                train_router(bench, mixture, self.learning_rate)
            make = self.gates

            def scored(examples: list[Example]) -> Scores:
                gates = None if make is None else make(bench, examples)
                return suite.score(bench.upper, examples, mixture, gates)

            yield scored


def train_router(bench: Bench, mixture: Any, learning_rate: float) -> None:
    """Train what the router learns on the experts' training rows, mixed; the experts stay."""
    parameters = mixture.trainable_parameters()["router"]
    rows = [e for name in bench.experts.names for e in bench.train if e.task == name]
    size = len(rows) // len(bench.experts.names)
    mixed = [e for i, e in enumerate(rows) if i % size < bench.effort.router_rows]

    def loss(part: list[int]) -> Tensor:
        chosen = [mixed[i] for i in part]
        batch = suite.collate(chosen)
        labels_B = torch.tensor([bench.experts.names.index(e.task) for e in chosen])
        with mixture.context(expert_labels=labels_B):  # of which most routers want to know nothing
            output = bench.upper.model(**suite.arguments(batch), use_cache=False)
        answers = suite.row_losses(output.logits.float(), batch.targets_BK).mean()
        return answers if output.aux_loss is None else answers + output.aux_loss

    torch.manual_seed(0)  # X-LoRA's classifier has dropout
    bench.upper.model.train()
    fit(loss, len(mixed), parameters, epochs=1, rate=learning_rate, seed=0)
    bench.upper.model.eval()


# ------------------------------------------------------------------ gates that come with the rows


def single(name: str) -> Mapping[str, Any]:
    """One expert alone, at the scale at which it was trained."""
    return {"kind": "fixed", "weights": {task: float(task == name) for task in suite.TASKS}}


def of_the_task(bench: Bench, examples: list[Example]) -> Callable[[list[int], int], Tensor]:
    """The expert of each row's task, which no router is told."""
    names = bench.experts.names
    gates_NE = torch.tensor([[float(e.task == name) for name in names] for e in examples])
    return lambda part, _length: gates_NE[part]


def by_centroids(weights: Weights) -> Gates:
    """By the cosines of a row's prompt with the centroid of each expert's prompts."""

    def gates(bench: Bench, examples: list[Example]) -> Callable[[list[int], int], Tensor]:
        centroids = build_centroids(bench.encoder, bench.samples(lambda e: e.prompt))
        found_NE = Retriever(bench.encoder, centroids, weights).gates([e.prompt for e in examples])
        return lambda part, _length: found_NE[part]

    return gates


def by_token_centroids(weights: Weights) -> Gates:
    """The same for the text up to each token, as the model reads it."""

    def gates(bench: Bench, examples: list[Example]) -> Callable[[list[int], int], Tensor]:
        read = bench.tokenizer.decode
        samples = bench.samples(lambda e: read(e.ids[: _prompt(e)], skip_special_tokens=True))
        centroids = build_centroids(bench.encoder, samples)
        retriever = Retriever(bench.encoder, centroids, weights, keep="end")
        return _along_the_text(retriever.gates, bench.tokenizer, examples)

    return gates


def by_classifier(bench: Bench, examples: list[Example]) -> Callable[[list[int], int], Tensor]:
    """By DLP-LoRA's classifier of a row's prompt, trained on the experts' prompts."""
    samples = bench.samples(lambda e: e.prompt)
    texts = [text for own in samples.values() for text in own]
    labels = [name for name, own in samples.items() for _ in own]
    classifier = train_classifier(bench.encoder, texts, labels, names=bench.experts.names)
    found_NE = classifier.gates([e.prompt for e in examples])
    return lambda part, _length: found_NE[part]


def _along_the_text(
    gates: GateFunction, tokenizer: Any, examples: Sequence[Example]
) -> Callable[[list[int], int], Tensor]:
    found_NSE = []
    for example in examples:
        ids_1S = torch.tensor([example.ids])
        found_NSE.append(token_gates(gates, tokenizer, ids_1S, [_prompt(example)])[0])

    def padded(part: list[int], length: int) -> Tensor:
        gates_BSE = torch.zeros(len(part), length, found_NSE[0].shape[-1])
        for b, i in enumerate(part):
            gates_BSE[b, length - len(found_NSE[i]) :] = found_NSE[i]
        return gates_BSE

    return padded


def _prompt(example: Example) -> int:
    """Number of tokens before the answer."""
    return next(i for i, target in enumerate(example.targets) if target >= 0) + 1


# ------------------------------------------------------------------ vectors of each expert


def gate_vectors(bench: Bench) -> Mapping[str, Any]:
    """PHATGOOSE's gates, trained on each expert's own rows."""
    data = {
        name: [suite.arguments(suite.collate(part), loss=True) for part in parts]
        for name, parts in _own_batches(bench, GATE_BATCH).items()
    }
    vectors = train_gate_vectors(
        bench.upper.model, bench.experts, data, steps=bench.effort.gate_steps
    )
    return {"kind": "phatgoose", "vectors": vectors}


def mean_inputs(bench: Bench) -> Mapping[str, Any]:
    """What each linear reads on average in each expert's own rows."""
    data = {
        name: [suite.arguments(suite.collate(parts[0]))]
        for name, parts in _own_batches(bench, MEAN_ROWS).items()
    }
    vectors = mean_activations(bench.upper.model, bench.experts, data, samples=MEAN_ROWS)
    return {"kind": "average_activation", "vectors": vectors}


def _own_batches(bench: Bench, size: int) -> dict[str, list[list[Example]]]:
    own = {name: [e for e in bench.train if e.task == name] for name in bench.experts.names}
    return {
        name: [rows[start : start + size] for start in range(0, len(rows), size)]
        for name, rows in own.items()
    }


# ------------------------------------------------------------------ weights found by trying


def lorahub(bench: Bench) -> Mapping[str, Any]:
    """LoraHub's weights: those with the least loss on a few rows of the mixed validation set."""
    few = [
        example
        for name in bench.experts.names
        for example in [e for e in bench.validation if e.task == name][:SHOTS]
    ]
    with bench.composed("given") as mixture:

        def loss(weights_E: Tensor) -> float:
            def same(part: list[int], _length: int) -> Tensor:
                return weights_E.expand(len(part), -1)

            return float(suite.score(bench.upper, few, mixture, same).loss_N.mean())

        found = search(penalized(loss), len(bench.experts.names), budget=bench.effort.tried_weights)
    return {
        "kind": "fixed",
        "weights": dict(zip(bench.experts.names, found.best.weights, strict=True)),
    }


def scaled(scale: float) -> Mapping[str, Any]:
    """Uniform weights whose sum is `scale`."""
    return {"weights": dict.fromkeys(suite.TASKS, scale / len(suite.TASKS))}


# ------------------------------------------------------------------ the list

NOTHING, OWN, ROWS = "the experts alone", "prompts of each expert", "rows of each expert"
FEW = f"{SHOTS} validation rows of each task"
TRAINED, CHOSEN = "training rows of all tasks", "validation rows, for its settings"
TOLD = "training rows and their tasks"
# the states that layers begin with are large, those that linears read are normalised
RATES, LOW_RATES = (3e-3, 1e-2), (1e-3, 3e-3)
SEARCHED = tuple({"top_k": k, "temperature": t} for k, t in SETTINGS)
GIVEN = {"kind": "given"}

ENTRANTS: tuple[Entrant, ...] = (
    Entrant("base model", "–"),
    *(Entrant(f"expert {task} alone", "–", single(task)) for task in suite.TASKS),
    Entrant("the expert of each row's task", "the task of each row", GIVEN, gates=of_the_task),
    Entrant("uniform", NOTHING, "uniform"),
    Entrant("Arrow", NOTHING, "arrow"),
    Entrant("SpectR", NOTHING, "spectr"),
    Entrant("SpectR, relative", NOTHING, {"kind": "spectr", "relative": True}),
    Entrant("LAG, 4 preselected", NOTHING, {"kind": "lag", "preselect": 4}),
    Entrant("centroids, mean of 3", OWN, GIVEN, gates=by_centroids(TopKMean())),
    Entrant("centroids, nearest", OWN, GIVEN, gates=by_centroids(TopKMean(k=1))),
    Entrant("centroids, per token", OWN, GIVEN, gates=by_token_centroids(SoftmaxWeights())),
    Entrant("DLP-LoRA's classifier", OWN, GIVEN, gates=by_classifier),
    Entrant("mean inputs", ROWS, mean_inputs),
    Entrant("PHATGOOSE", ROWS, gate_vectors),
    Entrant("LoraHub", FEW, lorahub),
    Entrant("MeteoRA", TRAINED, "meteora", grid=RATES),
    Entrant("MeteoRA, told the tasks", TOLD, {"kind": "meteora", "label_loss": 1.0}, grid=RATES),
    Entrant("MoLE", TRAINED, "mole", grid=RATES),
    Entrant("MoA", TOLD, "moa", grid=LOW_RATES),
    Entrant("LoRA-Flow", TRAINED, "lora_flow", grid=LOW_RATES),
    Entrant("hard top-1", TRAINED, "hard_top1", grid=(3e-4, 1e-3)),
    Entrant("X-LoRA", TRAINED, "xlora", grid=LOW_RATES),
    Entrant("uniform, scale chosen", CHOSEN, {"kind": "fixed"}, grid=tuple(map(scaled, SCALES))),
    Entrant("Arrow, settings chosen", CHOSEN, {"kind": "arrow"}, grid=SEARCHED),
    Entrant(
        "SpectR, relative, settings chosen",
        CHOSEN,
        {"kind": "spectr", "relative": True},
        grid=SEARCHED,
    ),
)

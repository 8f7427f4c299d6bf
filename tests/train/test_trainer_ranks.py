"""Trainers on two processes do what one does: transformers' path and TRL's, DDP and every ZeRO
stage (B-6, B-32, B-34, B-36)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import transformers
from launches import launch
from safetensors.torch import load_file
from torch import Tensor
from trainer_curves import CURVES, Curve, state, trained, trainer_of
from trainer_steps import PATHS, Step, distance, one_step

import molora
from molora.train import train

SCRIPT = Path(__file__).with_name("trainer_ranks.py")
STAGES = ("none", "0", "1", "2", "3")
SHAPES = ("2x1x4", "2x4x1")
CASES = ("ragged", "task", "same", "idle", "sparse", "types")

STEPS = [
    "trl,none,2x2x2,ragged",
    "trl,3,2x2x2,types",
    "trl,3,2x1x4,task",
    "trl,2,2x4x1,idle",
    "trl,0,2x1x4,same",
    "molora,none,2x1x4,sparse",
    "molora,2,2x4x1,same",
    "molora,3,2x2x2,idle",
    "transformers,none,2x4x1,types",
    "transformers,1,2x2x2,task",
]
ALL_STEPS = [
    *(f"{path},{stage},{shape},ragged" for path in PATHS for stage in "123" for shape in SHAPES),
    *(f"{path},{stage},2x2x2,{case}" for path in PATHS for stage in STAGES for case in CASES),
]
SOME_CURVES = [
    *("lora,2", "molora,2", "mixlora-switch,2", "packing,2", "lora_plus,2"),
    *("mola-task,3", "loramoe,3", "mixlora,3", "checkpointing,3", "bf16,3", "uneven,3"),
]
ALL_CURVES = [
    *(f"{name},{stage}" for name in CURVES for stage in "23"),
    *(f"{n},{s}" for n in ("mola", "packing", "bf16", "uneven") for s in ("none", "0", "1")),
    *("mola,3-offload", "checkpointing,3-offload"),
]
FAULTS = ["none,gradient", "2,loss", "3,gradient"]
ALL_FAULTS = [f"{stage},{kind}" for stage in STAGES for kind in ("gradient", "loss")]
QUANTISED = ["4,none", "4,3"]
ALL_QUANTISED = [f"{bits},{stage}" for bits in "48" for stage in ("none", "1", "2", "3")]
RUNS = ["none", "zero2", "zero3", "zero3_offload"]
# of the largest gradient: rounding of sums in another order
EXACT = 2e-5
CLOSE = 1e-4

# the first test waits for the launch
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1300)]


class Results:
    """What the script found, by job."""

    def __init__(self, directory: Path, **jobs: Sequence[str]) -> None:
        self.directory = directory
        names = [f"{name}:{arguments}" for name, found in jobs.items() for arguments in found]
        launch(SCRIPT, directory, *names, timeout=1200)
        self.found: dict[str, Any] = json.loads((directory / "results.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.directory / f"{name}.safetensors")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Results:
    directory = tmp_path_factory.mktemp("quick")
    write_run(directory, "best", base, "zero3")
    return Results(
        directory,
        step=STEPS,
        curve=SOME_CURVES,
        quantized=QUANTISED,
        fault=FAULTS,
        run=["best"],
        repeated=["uneven"],
    )


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Results:
    directory = tmp_path_factory.mktemp("slow")
    for engine in RUNS:
        write_run(directory, engine, base, engine)
    return Results(
        directory,
        step=ALL_STEPS,
        curve=ALL_CURVES,
        quantized=ALL_QUANTISED,
        fault=ALL_FAULTS,
        run=RUNS,
    )


def both(quick: Sequence[str], everything: Sequence[str]) -> list[Any]:
    """Parameters (fixture, argument): those of the default suite, and all as slow ones."""
    return [("quick", name) for name in quick] + [
        pytest.param("slow", name, marks=pytest.mark.slow) for name in everything
    ]


# ------------------------------------------------------------------ one step


@cache
def step_of_one(path: str, case: str, shape: str, directory: Path) -> Step:
    """All eight rows on one process, at once ("1x8") or in four parts ("4x2")."""
    rows, accumulate = {"1x8": (8, 1), "4x2": (2, 4)}[shape]
    return one_step(path, directory, case=case, rows=rows, accumulate=accumulate, use_cpu=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.mark.parametrize(("found", "job"), both(STEPS, ALL_STEPS))
def test_the_gradient_of_a_step_is_that_of_all_micro_batches_by_their_shares(
    found: str, job: str, request: pytest.FixtureRequest, alone: Path
) -> None:
    results: Results = request.getfixturevalue(found)
    path, stage, shape, case = job.split(",")
    figures = results.found[f"step:{job}"]
    assert figures["error"] < EXACT
    assert figures["loss_error"] < 1e-5
    if path != "transformers" or stage != "0":  # where the plain Trainer has no norm
        assert figures["norm_error"] < EXACT
    assert figures["partitioned"] == (stage == "3")
    supervised = figures["supervised"]
    first, second = supervised[: len(supervised) // 2], supervised[len(supervised) // 2 :]
    assert sum(second) == 0 if case == "idle" else sum(second) > 0
    if case == "sparse":
        assert 10 * sum(second) < 3 * sum(first)
    if case in ("task", "same"):
        moved = results.tensors(f"step-{path}-{stage}-{shape}-{case}")
        for whole in ("1x8", "4x2"):
            assert distance(moved, step_of_one(path, case, whole, alone).moved) < EXACT
    if case != "task":  # what would be forgotten shows
        assert figures["no_auxiliary"] > 0.1
        assert figures["no_ranks"] > 0.1
        assert figures["no_shares"] > 0.1
    else:
        assert distance(moved, step_of_one(path, "ragged", "1x8", alone).moved) > 0.1


# ------------------------------------------------------------------ twenty steps


@cache
def curve_of_one(curve: str, directory: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    return _alone(CURVES[curve], directory, gradient_accumulation_steps=2, **options)


def _alone(curve: Curve, directory: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    trainer = trainer_of(curve, directory, **options)
    told = trained(trainer)["curves"]
    return told, {name: value.clone() for name, value in state(trainer).items()}


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two states."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(("found", "job"), both(SOME_CURVES, ALL_CURVES))
def test_twenty_steps_have_the_curves_of_one_process(
    found: str, job: str, request: pytest.FixtureRequest, alone: Path
) -> None:
    results: Results = request.getfixturevalue(found)
    name, stage = job.split(",")
    told = results.found[f"curve:{job}"]
    assert told["partitioned"] == [stage.startswith("3")] * 20
    assert told["everyones"] == [told["curves"]] * 2
    curves, end = curve_of_one(name, alone)
    own = results.tensors(f"curve-{name}-{stage}")
    loss, norm = (apart(told["curves"][key], curves[key]) for key in ("loss", "grad_norm"))
    if CURVES[name].base_dtype == torch.bfloat16 and stage == "3":
        # ZeRO-3 sums gradients of inputs in another order, which bf16 rounds: as far from one
        # process as that is from float32
        exact = dataclasses.replace(CURVES[name], base_dtype=torch.float32)
        wide, wide_end = _alone(exact, alone, gradient_accumulation_steps=2)
        assert loss <= 2 * apart(wide["loss"], curves["loss"])
        assert norm <= 2 * apart(wide["grad_norm"], curves["grad_norm"])
        assert largest(own, end) <= largest(wide_end, end)
        return
    # rows that fill up the last batch of an epoch are routed and counted, but not learnt
    routed = ("tokens", "load_min", "load_max", "routing_entropy", "routing_margin")
    for key, values in curves.items():
        same = apart(told["curves"][key], values) < CLOSE
        assert same != (name == "uneven" and key in routed), key
    assert told["curves"].keys() - curves.keys() <= {"rank_agreement"}
    assert largest(own, end) < CLOSE
    assert curves["loss"][-1] < curves["loss"][0] or CURVES[name].freeze


def test_the_task_loss_is_that_of_all_rows_at_once(quick: Results, alone: Path) -> None:
    told = quick.found["curve:mola-task,3"]["curves"]
    at_once, _ = _alone(CURVES["mola-task"], alone, rows_per_batch=8)
    assert apart(told["loss"], at_once["loss"]) < CLOSE
    assert apart(told["grad_norm"], at_once["grad_norm"]) < CLOSE
    # half of the rows of every step give other curves
    half, _ = _alone(CURVES["mola-task"], alone, rows_per_batch=4)
    assert apart(told["loss"], half["loss"]) > 100 * CLOSE


def test_rows_that_fill_up_an_epoch_would_be_noticed(quick: Results, alone: Path) -> None:
    at_once, _ = _alone(CURVES["uneven"], alone, rows_per_batch=8)
    assert apart(quick.found["curve:uneven,3"]["curves"]["loss"], at_once["loss"]) < CLOSE
    assert apart(quick.found["repeated:uneven"], at_once["loss"]) > 50 * CLOSE


def test_the_ways_to_train_are_other_ways(alone: Path) -> None:
    """Clipping clips, and frozen roles, other learning rates and dtypes give other curves."""
    mola, _ = curve_of_one("mola", alone)
    for name in ("bf16", "router", "lora_plus"):
        assert apart(curve_of_one(name, alone)[0]["loss"], mola["loss"]) > 50 * CLOSE, name
    clipped, _ = curve_of_one("checkpointing", alone)
    assert min(clipped["grad_norm"]) > 3 * CURVES["checkpointing"].options["max_grad_norm"]
    assert apart(clipped["loss"], curve_of_one("mixlora", alone)[0]["loss"]) > 50 * CLOSE


# ------------------------------------------------------------------ quantised bases, faults


@pytest.mark.parametrize(
    ("found", "job"),
    both(QUANTISED, ALL_QUANTISED),
)
def test_a_quantised_base_trains_under_every_stage(
    found: str, job: str, request: pytest.FixtureRequest
) -> None:
    results: Results = request.getfixturevalue(found)
    bits, stage = job.split(",")
    expected, told = (results.found[f"quantized:{bits},{s}"] for s in ("none", stage))
    assert told["partitioned"] == [stage == "3"] * 2
    assert told["losses"] == pytest.approx(expected["losses"], abs=CLOSE)
    states = [results.tensors(f"quantized-{bits}-{s}") for s in ("none", stage)]
    # ZeRO-3 sums in another order, and int8 inputs of the base are rounded to other integers
    assert largest(*states) < (10 if job == "8,3" else 1) * CLOSE
    assert {value.dtype for value in states[1].values()} == {torch.float32}


@pytest.mark.parametrize(("found", "job"), both(FAULTS, ALL_FAULTS))
def test_what_is_not_finite_on_one_rank_stops_all_and_is_named(
    found: str, job: str, request: pytest.FixtureRequest
) -> None:
    """B-34."""
    told = request.getfixturevalue(found).found[f"fault:{job}"]
    place = "model.layers.1.mlp.down_proj"
    what = {
        "gradient": f"the gradient of {place}.experts.lora_B is not finite.",
        "loss": f"the loss is nan, first at the output of {place}.",
    }[job.split(",")[1]]
    assert told["said"][0] == told["said"][1]
    assert told["said"][0].startswith(f"step 3: rank 1: {what} No weight was changed by this step;")
    assert f"{told['checkpoint']} is the last complete checkpoint" in told["said"][0]
    assert told["checkpoint"] == "checkpoint-2"
    assert told["changed"] == 0
    assert told["finite"]


# ------------------------------------------------------------------ whole runs

EVALUATED = [
    {"prompt": row["prompt"], "completion": (" w5 w9 w2 w7 w1")[: 3 * (1 + 2 * (i % 2))]}
    for i, row in enumerate(tiny_runs.ROWS[:5])
]
"""Five rows, which two processes with two rows a batch fill up to eight."""


def write_run(directory: Path, name: str, base: Path, engine: str, **train: Any) -> Path:
    """DIRECTORY/NAME.yaml: a run whose evaluations get worse before its end."""
    rows = tiny_runs.write_rows(directory / "rows.jsonl", tiny_runs.ROWS * 2)
    held_out = tiny_runs.write_rows(directory / "eval.jsonl", EVALUATED)
    settings = {
        "max_steps": 12,
        "batch_size": 2,
        "learning_rate": 2e-2,
        "schedule": "constant",
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 3,
        "keep_best": "eval_loss",
        "deepspeed": None if engine == "none" else engine,
        **train,
    }
    if engine.startswith("zero3"):  # tiny parameters are not divided by default
        zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        if engine == "zero3_offload":
            zero |= {n: {"device": "cpu"} for n in ("offload_param", "offload_optimizer")}
        settings["deepspeed"] = str(directory / f"{name}.json")
        Path(settings["deepspeed"]).write_text(json.dumps({"zero_optimization": zero}))
    return tiny_runs.write_run(
        directory / f"{name}.yaml",
        base,
        rows,
        {"preset": "mola", "num_experts": 4, "rank": 3, "dropout": 0.0},
        data={"eval": [str(held_out)]},
        train=settings,
        output_dir=str(directory / f"{name}-out"),
    )


def evaluations(output: Path) -> list[float]:
    return [line["eval_loss"] for line in tiny_runs.lines(output / "metrics.jsonl", "eval")]


@pytest.mark.parametrize(("found", "name"), both(["best"], RUNS))
def test_a_run_on_two_processes_leaves_what_one_leaves(
    found: str, name: str, request: pytest.FixtureRequest, base: Path, tmp_path: Path
) -> None:
    results: Results = request.getfixturevalue(found)
    told, output = results.found[f"run:{name}"], results.directory / f"{name}-out"
    assert told["partitioned"] == [name in ("best", "zero3", "zero3_offload")] * 12
    # the same micro-batches, one after the other
    path = write_run(tmp_path, "one", base, "none", gradient_accumulation=2)
    expected = train(molora.load_config(path), progress=False)
    assert evaluations(output) == pytest.approx(evaluations(expected.output_dir), rel=CLOSE)
    # before rounding has grown
    assert evaluations(output)[0] == pytest.approx(evaluations(expected.output_dir)[0], rel=1e-6)
    losses = [
        [line["loss"] for line in tiny_runs.lines(out / "metrics.jsonl", "train")]
        for out in (output, expected.output_dir)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)

    # the best became the adapter, and it is not the last
    best = min(evaluations(output))
    assert told["metrics"]["eval_loss"] == pytest.approx(best)
    step = 3 * (1 + evaluations(output).index(best))
    assert step < 12
    mixtures = [
        molora.load(transformers.AutoModelForCausalLM.from_pretrained(base), output / directory)
        for directory in ("adapter", f"checkpoint-{step}", "checkpoint-12")
    ]
    adapter, kept, last = (mixture.state_dict() for mixture in mixtures)
    model: Any = mixtures[0].model
    assert largest(adapter, kept) == 0
    assert largest(kept, last) > 1e-2

    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(3, 15).view(2, 6)).logits
    trained_model = results.tensors(f"{name}-logits")["logits"]
    torch.testing.assert_close(logits, trained_model, rtol=0, atol=1e-5)
    tokens = by_hand(base, model)
    assert float(torch.cat(tokens).mean()) == pytest.approx(best, abs=1e-5)
    by_row = torch.stack([row.mean() for row in tokens])
    assert abs(float(by_row.mean()) - best) > 1e-2


@torch.no_grad()
def by_hand(base: Path, model: Any) -> list[Tensor]:
    """Losses of the tokens of each answer of EVALUATED, ended by the tokenizer's last token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    losses: list[Tensor] = []
    for row in EVALUATED:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        predictions, labels = logits[len(prompt) - 1 : -1], torch.tensor(answer)
        losses.append(torch.nn.functional.cross_entropy(predictions, labels, reduction="none"))
    return losses

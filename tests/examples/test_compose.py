"""The comparison of routers: exact where it saves work, right intervals, and tables as measured."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from chat_models import chat_model, chat_tokenizer, save_chat_model
from tiny_encoders import save_encoder
from tiny_models import randomize

import molora
from molora.generate import completion_loss

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "compose"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"examples.compose.{name}")


def names() -> list[str]:
    return [entrant.name for entrant in module("entrants").ENTRANTS]


@pytest.fixture
def upper() -> Any:
    model = chat_model(num_hidden_layers=3, max_position_embeddings=512)
    return module("suite").UpperLayers(model, 2)


@pytest.fixture
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "results.json").read_text("utf-8"))
    return found


MOLA = {
    "method": "mola",
    "groups": [
        {
            "targets": ["model.layers.2.mlp.up_proj", "model.layers.2.self_attn.q_proj"],
            "num_experts": 5,
            "expert": {"kind": "lora"},
            "rank": 2,
            "select": {"kind": "dense"},
        }
    ],
}


def attached(model: Any) -> molora.Mixture:
    mixture = molora.attach(model, molora.MixtureConfig.parse(MOLA))
    randomize(mixture)
    return mixture


def test_rows_of_the_splits_are_different() -> None:
    suite = module("suite")
    for task in suite.TASKS:
        splits = {s: suite.load_rows(task, s) for s in ("train", "validation", "test")}
        sizes = {split: len(rows) for split, rows in splits.items()}
        assert sizes == {"train": 200, "validation": 50, "test": 100}
        prompts = [row.prompt for rows in splits.values() for row in rows]
        assert len(set(prompts)) == len(prompts), task


def test_signatures_are_whole_functions_and_no_name_comes_twice() -> None:
    import ast

    names = []
    for split, number in (("train", 250), ("test", 100)):
        lines = (FOLDER / "signature" / f"{split}.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == number
        for line in lines:
            (function,) = ast.parse(json.loads(line)["completion"] + ": ...").body
            assert isinstance(function, ast.FunctionDef)
            names.append(function.name)
    assert len(set(names)) == len(names)


def test_upper_layers_score_as_the_whole_model_does(upper: Any) -> None:
    suite, tokenizer = module("suite"), chat_tokenizer()
    examples = suite.load_examples(upper, tokenizer, "test", 3)
    rows = [row for task in suite.TASKS for row in suite.load_rows(task, "test", 3)]
    base = suite.score(upper, examples).loss_N
    with_mixture = {}
    mixture = attached(upper.model)
    found = suite.score(upper, examples, mixture)
    with upper.whole():
        for number, row in enumerate(rows):
            nll, tokens = completion_loss(upper.model, tokenizer, [row])
            with_mixture[number] = nll / tokens
    expected = torch.tensor(list(with_mixture.values()), dtype=torch.float64)
    torch.testing.assert_close(found.loss_N, expected, rtol=1e-5, atol=1e-5)
    assert (base - expected).abs().max() > 1e-2
    mixture.detach()


def test_the_right_answer_counts_where_it_is_the_most_likely(upper: Any) -> None:
    suite, tokenizer = module("suite"), chat_tokenizer()
    right = suite.score(upper, suite.load_examples(upper, tokenizer, "test", 20)).right_N
    rows = [row for task in suite.TASKS for row in suite.load_rows(task, "test", 20)]
    expected = []
    for row in rows:
        if row.choices is None:
            expected.append(torch.nan)
            continue
        talk = [{"role": "user", "content": row.prompt}]
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        with upper.whole(), torch.no_grad():
            logits_V = upper.model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        # the tokenizer has a token per byte: answers are compared by their first
        first = {choice: logits_V[tokenizer(choice)["input_ids"][0]] for choice in row.choices}
        expected.append(float(first[row.label] == max(first.values())))
    assert 0 < torch.tensor(expected).nanmean() < 1
    torch.testing.assert_close(right, torch.tensor(expected).double(), equal_nan=True)


def test_gates_reach_the_tokens_of_their_rows(upper: Any, tmp_path: Path) -> None:
    suite, entrants = module("suite"), module("entrants")
    experts = tiny_experts(upper, tmp_path)
    examples = suite.load_examples(upper, chat_tokenizer(), "validation", 2)
    bench = entrants.Bench(upper, chat_tokenizer(), experts, examples, examples, examples, None)
    own = entrants.Entrant("", "", {"kind": "given"}, gates=entrants.of_the_task)
    with own.ready(bench) as scored:
        together = scored(examples)
    assert together.own_N.eq(1).all()

    def by_token(_bench: Any, _examples: Any) -> Any:
        def gates(part: list[int], length: int) -> torch.Tensor:
            gates_BSE = torch.zeros(len(part), length, 5)
            for b, i in enumerate(part):
                start = length - len(examples[i].ids)
                gates_BSE[b, start:, list(suite.TASKS).index(examples[i].task)] = 1
            return gates_BSE

        return gates

    with entrants.Entrant("", "", {"kind": "given"}, gates=by_token).ready(bench) as scored:
        torch.testing.assert_close(scored(examples).loss_N, together.loss_N)
    alone = {}
    for task in suite.TASKS:
        with entrants.Entrant("", "", entrants.single(task)).ready(bench) as scored:
            alone[task] = scored(examples)
            shares = [float(e.task == task) for e in examples]
            assert alone[task].own_N.tolist() == shares
    expected = [alone[e.task].loss_N[i].item() for i, e in enumerate(examples)]
    torch.testing.assert_close(together.loss_N, torch.tensor(expected).double())
    assert (together.loss_N - alone["language"].loss_N).abs().max() > 1e-2


def tiny_experts(upper: Any, folder: Path) -> molora.FrozenExperts:
    """Five random LoRAs on the upper layers, saved by package peft."""
    import peft

    for seed, task in enumerate(module("suite").TASKS):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=2 + seed,
            target_modules=["q_proj", "up_proj"],
            layers_to_transform=[2],
            layers_pattern="layers",
            init_lora_weights=False,
        )
        adapted = peft.get_peft_model(upper.model, config)
        adapted.save_pretrained(folder / task)
        adapted.unload()
    upper.model.requires_grad_(False)
    return molora.load_experts({task: folder / task for task in module("suite").TASKS})


def test_interval_is_that_of_a_stratified_mean() -> None:
    evaluate = module("evaluate")
    source = torch.Generator().manual_seed(1)
    values = torch.randn(400, generator=source, dtype=torch.float64)
    tasks = ["a"] * 200 + ["b"] * 200
    values[200:] += 50  # tasks differ: that is no uncertainty of the suite
    low, high = evaluate.interval(values, tasks)
    error = (values[:200].var() / 200 + values[200:].var() / 200).sqrt() / 2
    assert abs((high - low) / (2 * 1.96 * float(error)) - 1) < 0.05
    assert low < float(values.mean()) < high
    assert evaluate.interval(values, tasks) == (low, high)
    level = torch.tensor([1.0, 1.0, 3.0, 3.0]).double()
    assert evaluate.interval(level, ["a", "a", "b", "b"]) == (2.0, 2.0)


def test_results_are_joined_only_with_like_ones() -> None:
    evaluate = module("evaluate")
    entrants = {"uniform": {"loss": 1.0}, "LoraHub": {"loss": 2.0}, "expert language alone": {}}
    entrants["expert language alone"]["loss"] = 3.0
    old = {"model": "m", "rows": {"test": 5}, "best_single": "expert language alone"}
    new = {**old, "entrants": {**entrants, "Arrow": {"loss": 0.5}, "LoraHub": {"loss": 1.5}}}
    old["entrants"] = entrants
    both = evaluate.merged(old, new)
    assert list(both["entrants"]) == ["expert language alone", "uniform", "Arrow", "LoraHub"]
    assert both["entrants"]["LoraHub"] == {"loss": 1.5}
    with pytest.raises(SystemExit, match="rows"):
        evaluate.merged(old, {**new, "rows": {"test": 6}})
    changed = {**new["entrants"], "uniform": {"loss": 1.01}}
    with pytest.raises(SystemExit, match=r"uniform had the loss 1\.0, now 1\.01"):
        evaluate.merged(old, {**new, "entrants": changed})


def test_readmes_tables_are_those_of_the_results(results: dict[str, Any]) -> None:
    page = (FOLDER / "README.md").read_text("utf-8")
    tables = module("evaluate").tables(results)
    blocks = "\n".join(tables).split("\n\n")
    assert len(blocks) == 2
    assert all(block.strip() in page for block in blocks)
    assert list(results["entrants"]) == names()
    changed = {**results, "entrants": {**results["entrants"]}}
    changed["entrants"]["uniform"] = {**changed["entrants"]["uniform"], "loss": 0.0}
    assert "\n".join(module("evaluate").tables(changed)).split("\n\n")[0].strip() not in page


@pytest.mark.parametrize("name", ["Arrow", "centroids, mean of 3", "centroids, per token"])
def test_arrow_and_centroids_beat_uniform_mixing(results: dict[str, Any], name: str) -> None:
    middle, low, high = results["entrants"][name]["minus_uniform"]
    assert low < middle < high < 0


def test_the_scripts_run_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("suite"), "ADAPTED", 1)
    model = save_chat_model(tmp_path / "model", max_position_embeddings=512)
    encoder = save_encoder(tmp_path / "encoder")
    experts, output = tmp_path / "experts", tmp_path / "results.json"
    common = ["--fast", "--model", str(model)]
    module("train_experts").main([*common, "--output", str(experts)])
    before = {path: path.read_bytes() for path in experts.rglob("*.safetensors")}
    assert len(before) == 5
    some = ["Arrow, settings chosen", "centroids, per token", "LoraHub", "PHATGOOSE"]
    paths = ["--experts", str(experts), "--encoder", str(encoder), "--output", str(output)]
    module("evaluate").main([*common, *paths, "--only", *some, "the expert of each row's task"])
    found = json.loads(output.read_text("utf-8"))
    assert found["entrants"].keys() > {"uniform", *some}
    module("evaluate").main([*common, *paths, "--only", "MeteoRA, told the tasks"])
    again = json.loads(output.read_text("utf-8"))["entrants"]
    assert list(again) == [n for n in names() if n in {*found["entrants"], *again}]
    assert {name: again[name] for name in found["entrants"]} == found["entrants"]
    assert again.keys() - found["entrants"].keys() == {"MeteoRA, told the tasks"}
    assert all(e["loss"] > 0 for e in found["entrants"].values())
    assert found["entrants"]["the expert of each row's task"]["own"] == 1
    assert before == {path: path.read_bytes() for path in experts.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_thing_runs_with_few_rows(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    experts, output = tmp_path / "experts", tmp_path / "results.json"
    for command in (
        ["train_experts", "--fast", "--output", str(experts)],
        ["evaluate", "--fast", "--experts", str(experts), "--output", str(output)],
    ):
        out = subprocess.run(
            [sys.executable, "-m", f"examples.compose.{command[0]}", *command[1:]],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    assert len(json.loads(output.read_text("utf-8"))["entrants"]) == len(
        module("entrants").ENTRANTS
    )

"""`molora compose`: from directories of package peft to a mixture that generates."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_experts import save_experts
from safetensors.torch import load_file
from tiny_models import batch_for
from tiny_runs import write_rows
from transformers import AutoModelForCausalLM

import molora as package
from molora.compose.stored_vectors import save_vectors
from molora.presets.frozen import ROUTERS


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three unlike LoRAs for the base."""
    return save_experts(tmp_path_factory.mktemp("experts"), base)


@pytest.fixture
def given(base: Path, experts: dict[str, Path]) -> list[Any]:
    """The base and the experts as options."""
    pairs = [part for name, path in experts.items() for part in ("--expert", f"{name}={path}")]
    return ["--base", base, *pairs]


def composed(base: Path, experts: dict[str, Path], **options: Any) -> package.Mixture:
    model = AutoModelForCausalLM.from_pretrained(base)
    return package.compose(model, package.load_experts(experts), **options)


def logits(mixture: package.Mixture) -> torch.Tensor:
    with torch.no_grad():
        return mixture.model(**batch_for(mixture.model, labels=False)).logits


def test_composed_mixture_is_that_of_the_function(
    molora: Callable[..., Any],
    base: Path,
    experts: dict[str, Path],
    given: list[Any],
    tmp_path: Path,
) -> None:
    options = ["--router", "arrow", "--missing", "renorm", "router.top_k=2", "router.temperature=3"]
    outcome = molora("compose", *given, *options, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    router = {"kind": "arrow", "top_k": 2, "temperature": 3.0}
    expected = composed(base, experts, router=router, missing="renorm")
    found = package.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert found.config == expected.config
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=0)
    with expected.disabled():
        assert (logits(found) - logits(expected)).abs().max() > 0.1
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[0] == ["expert", "rank", "linears", "‖ΔW‖", "base"]
    assert [(line[0], *line[1:3], line[4]) for line in lines[1:4]] == [
        ("math", "3", "4", str(base)),
        ("code", "3", "4", str(base)),
        ("law", "5", "2", str(base)),
    ]
    adapter = package.load_experts(experts).adapters["code"].modules.values()
    size = sum(float((m.scaling * m.lora_B @ m.lora_A).square().sum()) for m in adapter) ** 0.5
    assert lines[2][3] == f"{size:.3g}"


def test_new_and_trainable_experts_and_settings_of_the_mixture(
    molora: Callable[..., Any],
    base: Path,
    experts: dict[str, Path],
    given: list[Any],
    tmp_path: Path,
) -> None:
    options = ["--router", "linear", "--new", "own", "--trainable", "math", "new.own.rank=2"]
    sets = ["mixture.dtype=bfloat16", "seed=5", "mixture.dropout=0.25"]
    outcome = molora("compose", *given, *options, *sets, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    found = package.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    settings = {"router": "linear", "trainable": ["math"], "new": {"own": {"rank": 2}}, "seed": 5}
    expected = composed(base, experts, **settings, dtype="bfloat16", dropout=0.25)
    assert found.config == expected.config
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert found.num_parameters()["experts"] > 0


@pytest.mark.parametrize("router", ["uniform", "lag", "lora_flow", "hard_top1", "xlora"])
def test_prompts_of_unequal_length_generate_together_as_alone(
    molora: Callable[..., Any], given: list[Any], tmp_path: Path, router: str
) -> None:
    assert molora("compose", *given, "--router", router, "--out", tmp_path).code == 0
    arguments = ["generate", "--adapter", tmp_path, "--max-new-tokens", 6]
    prompts = ["Hi", "Hello there, you"]
    alone = [molora(*arguments, "--prompt", prompt).out for prompt in prompts]
    together = molora(*arguments, *(part for p in prompts for part in ("--prompt", p)))
    assert together.code == 0, together.err
    assert together.out == "".join(f"> {p}\n{text}" for p, text in zip(prompts, alone, strict=True))


def test_experts_are_added_and_dropped_without_their_directories(
    molora: Callable[..., Any],
    base: Path,
    experts: dict[str, Path],
    tmp_path: Path,
) -> None:
    copies = {n: shutil.copytree(p, tmp_path / n) for n, p in experts.items()}
    first = [part for n in ("math", "law") for part in ("--expert", f"{n}={copies[n]}")]
    options = ["--router", "arrow", "--out", tmp_path / "one", "router.temperature=2"]
    assert molora("compose", "--base", base, *first, *options).code == 0
    shutil.rmtree(copies["math"])
    shutil.rmtree(copies["law"])
    edit = ["--from", tmp_path / "one", "--add", f"code={copies['code']}", "--drop", "math"]
    outcome = molora("compose", *edit, "--out", tmp_path / "two")
    assert outcome.code == 0, outcome.err
    router = {"kind": "arrow", "temperature": 2.0, "top_k": 2}
    expected = composed(base, {name: experts[name] for name in ("law", "code")}, router=router)
    found = package.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "two")
    assert found.config == expected.config
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)
    # settings of the router that is there, in the same place
    one = molora("compose", "--from", tmp_path / "two", "router.top_k=1")
    assert one.code == 0, one.err
    assert f"The mixture is in {tmp_path / 'two'}" in one.out
    found = package.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "two")
    assert found.config.groups[0].select.k.value == 1  # type: ignore[union-attr]
    assert found.config.groups[0].router.temperature == 2.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop", "maths"], "Close names: math"),
        (["--add", "math={code}"], "is called 'math' already"),
        (["--new", "x"], "router arrow is made from the experts' factors"),
        (["router.topk=1"], "Close names: top_k"),
        (["--base", "nowhere"], "cannot be loaded"),
        (["mixture.train_modules=[lm_heda]"], "lm_head"),
    ],
)
def test_an_edit_that_cannot_be_writes_nothing(
    molora: Callable[..., Any],
    given: list[Any],
    experts: dict[str, Path],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    assert molora("compose", *given, "--out", tmp_path / "one").code == 0
    arguments = [argument.replace("{code}", str(experts["code"])) for argument in arguments]
    edit = ["compose", "--from", tmp_path / "one", "--out", tmp_path / "two"]
    outcome = molora(*edit, *arguments)
    assert (outcome.code, outcome.err.count("Error")) == (2, 1)
    assert message in outcome.err
    assert not (tmp_path / "two").exists()
    assert "Name it with --from" in molora("compose", *given, "--drop", "math", *edit[3:]).err


def test_inspect_shows_experts_with_their_origin_the_router_and_ragged_layers(
    molora: Callable[..., Any], given: list[Any], experts: dict[str, Path], tmp_path: Path
) -> None:
    options = ["--router", "linear", "--new", "own", "--missing", "zero", "new.own.alpha=4"]
    assert molora("compose", *given, *options, "--out", tmp_path).code == 0
    outcome = molora("inspect", tmp_path)
    assert outcome.code == 0
    facts = [re.split(r" {2,}", line) for line in outcome.out.splitlines()]
    table = {row[0]: row[1:] for row in facts if row[0] in {*experts, "own"}}
    read = package.load_experts(experts)
    for name, adapter in read.adapters.items():
        assert table[name][4] == adapter.sha256[:12]
    # alpha over the rank, over its root with rsLoRA
    base = str(given[1])
    assert table["math"] == ["3", "1.66667", "4", "float32, frozen", table["math"][4], base]
    assert table["law"][:4] == ["5", f"{5 / 5**0.5:g}", "2", "float32, frozen"]
    assert table["own"] == ["8", "0.5", "6", "float32, trained", "new", "-"]
    text = outcome.out
    assert "router   linear, softmax, top_k (k 2); a decision for every linear" in text
    assert "missing  zero: the gate of an expert is lost" in text
    assert "6 linears with experts, 6 routers" in text
    first = outcome.out.splitlines().index("layer             experts×rank     linears")
    assert [line.split("  ") for line in outcome.out.splitlines()[first + 1 : first + 3]] == [
        ["model.layers.0–1", "1×3 + 1×8", "", "", "", "mlp: down_proj; self_attn: v_proj"],
        [*[""] * 9, "2×3 + 1×5 + 1×8", "self_attn: q_proj"],
    ]


def test_inspect_counts_a_router_with_two_tensors_once(
    molora: Callable[..., Any], given: list[Any], tmp_path: Path
) -> None:
    assert molora("compose", *given, "--router", "lag", "--out", tmp_path).code == 0
    assert "6 linears with experts, 6 routers" in molora("inspect", tmp_path).out


def test_a_library_is_every_adapter_of_a_directory(
    molora: Callable[..., Any], base: Path, experts: dict[str, Path], tmp_path: Path
) -> None:
    library = next(iter(experts.values())).parent
    outcome = molora("compose", "--base", base, "--library", library, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    found = package.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert found.config.groups[0].expert.names == ("code", "law", "math")  # type: ignore[union-attr]
    both = ["--library", library, "--expert", f"x={library / 'math'}", "--out", tmp_path / "out"]
    assert "Give one of the two" in molora("compose", "--base", base, *both).err


def test_starts_in_the_base_are_converted_by_the_base(
    molora: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    settings = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8}
    kinds = {"pissa": {**settings, "init_lora_weights": "pissa"}}
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**kinds["pissa"])
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "before")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1.5)
    with torch.no_grad():
        expected = model(**batch_for(model, labels=False)).logits
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "pissa")
    options = ["--router", "uniform", "--expert", f"pissa={tmp_path / 'pissa'}"]
    given = [[], ["--initial", f"pissa={tmp_path / 'before'}"]]
    for number, initial in enumerate(given):
        out = tmp_path / str(number)
        outcome = molora("compose", "--base", base, *options, *initial, "--out", out)
        assert outcome.code == 0, outcome.err
        assert "converted from pissa" in outcome.out
        found = package.load(AutoModelForCausalLM.from_pretrained(base), out)
        torch.testing.assert_close(logits(found), expected, rtol=1e-3, atol=1e-3)
        with found.disabled():
            assert (logits(found) - expected).abs().max() > 0.05


def test_pickled_adapters_are_read_only_if_that_is_allowed(
    molora: Callable[..., Any], base: Path, experts: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(experts["math"], tmp_path / "copy")
    tensors = load_file(copy / "adapter_model.safetensors")
    (copy / "adapter_model.safetensors").unlink()
    torch.save(tensors, copy / "adapter_model.bin")
    arguments = ["compose", "--base", base, "--expert", f"math={copy}", "--out", tmp_path / "out"]
    assert molora(*arguments).code == 2
    outcome = molora(*arguments, "--allow-pickle")
    assert outcome.code == 0, outcome.err


def test_routers_of_other_packages_are_read(
    molora: Callable[..., Any],
    base: Path,
    experts: dict[str, Path],
    given: list[Any],
    tmp_path: Path,
) -> None:
    weights = {"math": 0.5, "code": -1.0, "law": 1.5}
    (tmp_path / "weights.json").write_text(json.dumps(weights))
    options = ["--router", tmp_path / "weights.json", "--out", tmp_path / "out"]
    outcome = molora("compose", *given, *options)
    assert outcome.code == 0, outcome.err
    found = package.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert found.config.groups[0].router.weights == (0.5, -1.0, 1.5)  # type: ignore[union-attr]
    settings = {"model_type": "llama", "num_experts_per_tok": 2, "base_model": "m"}
    names = [{"expert_name": name, "model_id": name} for name in experts]
    (tmp_path / "m.json").write_text(
        json.dumps({**settings, "experts": names, "router_layers": ["q_proj"]})
    )
    options = ["--router", tmp_path / "m.json", "--vectors", "arrow", "router.temperature=2"]
    outcome = molora("compose", *given, *options, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    router = {"kind": "linear", "top_k": 2, "temperature": 2, "vectors": "arrow"}
    found = package.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    expected = composed(base, experts, router=router)
    assert found.config == expected.config
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_an_xlora_is_composed_as_it_is(
    molora: Callable[..., Any], given: list[Any], base: Path, tmp_path: Path
) -> None:
    options = ["--router", "xlora", "router.depth=2", "router.width=8", "seed=3"]
    assert molora("compose", *given, *options, "--out", tmp_path / "one").code == 0
    to = ["--to", "peft-xlora", "--out", tmp_path / "xlora"]
    assert molora("export", tmp_path / "one", *to).code == 0
    back = ["compose", "--base", base, "--router", tmp_path / "xlora", "--out", tmp_path / "two"]
    outcome = molora(*back)
    assert outcome.code == 0, outcome.err
    assert [line.split()[0] for line in outcome.out.splitlines()[1:4]] == ["0", "1", "2"]
    found, expected = (
        logits(package.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / name))
        for name in ("two", "one")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert "it takes no --from" in molora(*back, "--new", "x").err
    assert "says it" in molora(*back, "router.depth=1").err
    shutil.rmtree(tmp_path / "two")
    moved = [f"--expert={number}={tmp_path / 'xlora' / str(number)}" for number in range(3)]
    assert molora(*back, *moved).code == 0


def test_stored_vectors_are_what_a_router_compares_with(
    molora: Callable[..., Any],
    base: Path,
    experts: dict[str, Path],
    given: list[Any],
    tmp_path: Path,
) -> None:
    read = package.load_experts(experts)
    source = torch.Generator().manual_seed(0)
    vectors = {
        name: {p: torch.randn(m.lora_A.shape[1], generator=source) for p, m in a.modules.items()}
        for name, a in read.adapters.items()
    }
    save_vectors(tmp_path / "gates", vectors, read, kind="gate")
    options = ["--router", "phatgoose", "--out", tmp_path / "out"]
    assert "needs `vectors`" in molora("compose", *given, *options).err
    outcome = molora("compose", *given, *options, "--vectors", tmp_path / "gates")
    assert outcome.code == 0, outcome.err
    expected = composed(base, experts, router={"kind": "phatgoose", "vectors": vectors})
    found = package.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    means = ["--router", "average_activation", "--vectors", tmp_path / "gates"]
    outcome = molora("compose", *given, *means, "--out", tmp_path / "other")
    assert "holds vectors of kind 'gate'; this needs 'mean'" in outcome.err
    on = ["--from", tmp_path / "out", "--vectors", tmp_path / "gates", "--out", tmp_path / "other"]
    assert "given by --expert" in molora("compose", *on).err


def test_training_makes_a_run_that_goes_on(
    molora: Callable[..., Any], given: list[Any], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    out = tmp_path / "run"
    settings = ["train.max_steps=3", "train.batch_size=4", "train.save_steps=2", "seed=3"]
    options = ["--router", "linear", "--new", "own", "--train", rows, "--out", out, "--quiet"]
    outcome = molora("compose", *given, *options, *settings, "data.max_length=64")
    assert outcome.code == 0, outcome.err
    assert "‖ΔW‖" in outcome.out
    assert f"Its mixture is in {out / 'adapter'}" in molora("inspect", out).err
    on = molora("compose", "--from", out, *given, "--out", tmp_path / "on")
    assert f"Its mixture is in {out / 'adapter'}" in on.err
    assert "trained" in molora("inspect", out / "adapter").out
    config = package.load_config(out / "config.yaml")
    assert (config.train.start_from, config.seed) == (out / "composed", 3)
    assert config.data.max_length == 64
    again = molora("train", out / "config.yaml", "--resume", "auto", "--quiet")
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "{rows}"], "router arrow has nothing to learn and every expert is frozen"),
        (["--train", "{rows}", "--router", "uniform"], "router uniform has nothing to learn"),
        (["--train", "{rows}", "--router", "linear", "train.max_step=2"], "Close names: max_steps"),
        (["--train", "{rows}", "--router", "linear", "data.max_len=2"], "Close names: max_length"),
        (["--train", "{rows}", "--router", "linear", "train.start_from=x"], "train.start_from"),
        (["--router", "linear", "train.max_steps=2"], "nothing is trained. Name rows with --train"),
    ],
)
def test_training_that_cannot_be_writes_nothing(
    molora: Callable[..., Any],
    given: list[Any],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    filled = [argument.replace("{rows}", rows) for argument in arguments]
    outcome = molora("compose", *given, *filled, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("Error")) == (2, 1)
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


def test_notes_are_printed_and_cannot_steer_the_terminal(
    molora: Callable[..., Any], base: Path, experts: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(experts["math"], tmp_path / "copy")
    path = copy / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": "other\x1b[2J"}))
    arguments = ["--expert", f"a={copy}", "--expert", f"b={experts['math']}"]
    outcome = molora("compose", "--base", base, *arguments, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    notes = [line for line in outcome.out.splitlines() if line.startswith("note ")]
    assert any("their tensors are the same" in note for note in notes)
    assert any("trained on" in note for note in notes)
    assert "\x1b" not in outcome.out + molora("inspect", tmp_path / "out").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--router", "arow"], "Close names: arrow"),
        (["router.topk=2"], "unknown argument 'topk'. Close names: top_k"),
        (["router.top_k=9"], "top_k=9 exceeds num_experts=3"),
        (["rooter.top_k=9"], "unknown section 'rooter'. Close names: router"),
        (["mixture.dtyp=float16"], "unknown key 'dtyp'. Close names: dtype"),
        (["mixture.groups=[]"], "unknown key 'groups'"),
        (["router=7"], "router=7: give its settings"),
        (["seed=-1"], "seed=-1"),
        (["router.top_k"], "not of the form key.path=value"),
        (["--expert", "math=elsewhere"], "--expert math is given twice"),
        (["--expert", "directory"], "'directory' is not of the form NAME=DIR"),
        (["--expert", "a/b=directory"], "cannot be called"),
        (["--expert", "x={tmp}/nowhere"], "nowhere"),
        (["--missing", "drop"], "missing"),
        (["--new", "math", "--router", "linear"], "cannot be called 'math'"),
        (["--new", "own"], "router arrow is made from the experts' factors"),
        (["--new", "own", "--router", "linear", "new.own.rank=two"], "new.own.rank='two'"),
        (["--new", "own", "--router", "linear", "new.own.rnak=2"], "Close names: rank"),
        (["--router", "fixed"], "router fixed needs 'weights'"),
        (["--router", "fixed", "router.weights=3"], "router.weights=3"),
        (["--trainable", "maths"], "Close names: math"),
        (["model.name=nowhere/at/all"], "cannot be loaded"),
    ],
)
def test_a_users_error_is_exit_code_2_and_writes_nothing(
    molora: Callable[..., Any],
    given: list[Any],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    outcome = molora("compose", *given, *arguments, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("Error") == 1
    assert not (tmp_path / "out").exists()


def test_base_experts_and_a_place_are_needed(molora: Callable[..., Any], tmp_path: Path) -> None:
    assert "--base is missing" in molora("compose", "--out", tmp_path / "out").err
    assert "--out is missing" in molora("compose", "--base", "x").err
    assert "--out is missing" in molora("compose", "--from", "x", "--train", "y").err
    none = molora("compose", "--base", "x", "--out", tmp_path / "out")
    assert "0 experts were given" in none.err
    (tmp_path / "file").write_text("")
    blocked = molora("compose", "--base", "x", "--expert", "a=b", "--out", tmp_path / "file")
    assert "is not a directory" in blocked.err


def test_every_router_is_listed(molora: Callable[..., Any]) -> None:
    assert all(re.search(rf"^  {name} ", molora("methods").out, re.M) for name in ROUTERS)

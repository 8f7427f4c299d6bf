"""The cost model: what "auto" stands for, from shapes and a file of figures alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molora.errors import BackendError, ConfigError
from molora.kernels import BACKENDS, calibrate, cost, datasheet
from molora.kernels.calibrate import Case, Effort, fit, time_case
from molora.kernels.calibration import (
    Calibration,
    DeviceFigures,
    DtypeFigures,
    Line,
    load_calibration,
    shipped,
    user_file,
)
from molora.kernels.work import BACKENDS as KNOWN
from molora.kernels.work import OPS, Product, Shape, Work, work

SIZES = {
    "in_features": 1024,
    "out_features": 1024,
    "num_experts": 8,
    "rank": 8,
    "slots": 2,
    "dtype": torch.float32,
    "device_type": "cpu",
}
SHAPE = Shape(1024, 1024, 512, num_experts=8, rank=4, slots=2)


def figures(lines: dict[tuple[str, str, str], Line], rate: float = 1e9) -> Calibration:
    """A CPU of one rate, on which moving bytes takes no time."""
    rates = dict.fromkeys(("plain", "grouped"), ((1, rate),))
    return Calibration(
        {"cpu": DeviceFigures("a test", ((1, 1e30),), 0.0, {"float32": DtypeFigures(rates, lines)})}
    )


def flat(**seconds: float) -> Calibration:
    """Backends of these seconds, whatever the shape."""
    return figures(
        {
            (op, name, mode): Line(0.0, 0.0, value)
            for name, value in seconds.items()
            for op in OPS
            for mode in ("forward", "training")
        }
    )


# ---------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("fastest", ["dense", "grouped", "gather"])
def test_the_backend_of_the_least_estimated_time_is_chosen(fastest: str) -> None:
    seconds = dict.fromkeys(("reference", "dense", "grouped", "gather"), 1.0)
    options = {**SIZES, "training": False, "calibration": flat(**{**seconds, fastest: 0.5})}
    assert cost.choose("lora_mix", rows=7, **options) == fastest
    assert cost.choose("lora_rows", rows=7, **options) == fastest


def test_forward_alone_and_training_have_figures_of_their_own() -> None:
    lines = {
        ("lora_mix", "dense", "forward"): Line(0, 0, 2.0),
        ("lora_mix", "dense", "training"): Line(0, 0, 1.0),
        ("lora_mix", "gather", "forward"): Line(0, 0, 1.0),
        ("lora_mix", "gather", "training"): Line(0, 0, 2.0),
    }
    chosen = {
        training: cost.choose(
            "lora_mix", rows=1, **SIZES, calibration=figures(lines), training=training
        )
        for training in (False, True)
    }
    assert chosen == {False: "gather", True: "dense"}


def test_the_reference_is_never_chosen() -> None:
    calibration = flat(reference=1e-9, dense=1.0)
    names = ("reference", "dense")
    assert cost.choose("lora_mix", rows=7, **SIZES, calibration=calibration, names=names) == "dense"


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("triton", {}, "needs a GPU"),
        ("triton", {"device_type": "cuda", "dtype": torch.float64}, "float64"),
        ("grouped", {"dtype": torch.float64}, "float64"),
        ("reference", {}, "specification"),
    ],
)
def test_a_backend_that_cannot_run_there_is_never_chosen(
    name: str, change: dict[str, Any], why: str
) -> None:
    calibration = flat(**{name: 1e-9, "dense": 1.0})
    calibration = Calibration({**calibration.devices, "cuda": calibration.devices["cpu"]})
    sizes = {**SIZES, **change}
    assert cost.choose("lora_mix", rows=7, **sizes, calibration=calibration) == "dense"
    assert why in cost.refusal(name, sizes["dtype"], sizes["device_type"])
    # the control: it is chosen where it can run
    if name != "reference":
        sizes |= {"dtype": torch.float32, "device_type": "cuda"}
        assert cost.choose("lora_mix", rows=7, **sizes, calibration=calibration) == name


def test_without_figures_of_a_device_the_choice_is_dense_and_says_why() -> None:
    assert cost.choose("lora_mix", rows=7, **{**SIZES, "device_type": "mps"}) == "dense"
    rows = cost.explain("lora_mix", SHAPE, dtype=torch.float32, device_type="mps")
    assert {row.seconds for row in rows} == {None}
    assert "no figures for mps" in {row.reason for row in rows}


def test_a_dtype_without_figures_has_those_of_the_nearest() -> None:
    calibration = flat(dense=2.0, grouped=1.0)
    sizes = {**SIZES, "dtype": torch.bfloat16}
    assert cost.choose("lora_mix", rows=7, **sizes, calibration=calibration) == "grouped"


def test_copies_of_factors_are_neither_kept_nor_made_of_all_experts() -> None:
    options = {"rows": 1, "calibration": flat(dense=2.0, gather=1.0)}
    for change, expected in (
        ({"training": False}, "gather"),
        ({"training": True}, "dense"),
        ({"training": False, "slots": None}, "dense"),
    ):
        assert cost.choose("lora_mix", **{**SIZES, **change}, **options) == expected


def test_ungated_rows_have_all_experts() -> None:
    every = cost.choose("lora_mix", rows=64, **{**SIZES, "slots": None})
    assert every == cost.choose("lora_mix", rows=64, **{**SIZES, "slots": 8}) == "dense"


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(BackendError, match=r"op='lora_mux' does not exist\. Known: lora_mix"):
        cost.choose("lora_mux", rows=1, **SIZES)


@given(
    rows=st.integers(0, 10**6),
    features=st.integers(1, 10**5),
    experts=st.integers(1, 256),
    rank=st.integers(1, 512),
    slots=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    device=st.sampled_from(["cpu", "cuda"]),
    shared_A=st.booleans(),
)
def test_every_shape_has_a_finite_estimate_and_a_choice(
    rows: int,
    features: int,
    experts: int,
    rank: int,
    slots: int,
    dtype: torch.dtype,
    device: str,
    shared_A: bool,
) -> None:
    shape = Shape(rows, features, features, experts, rank, min(slots, experts), shared_A)
    for op in OPS:
        for training in (False, True):
            options = {"dtype": dtype, "device_type": device, "training": training}
            for row in cost.explain(op, shape, **options):
                assert row.seconds is None or 0 <= row.seconds < float("inf")
            sizes = {**SIZES, **options, "num_experts": experts, "rank": rank}
            sizes |= {"in_features": features, "out_features": features, "slots": shape.slots}
            assert cost.choose(op, rows=rows, shared_A=shared_A, **sizes) in cost.CANDIDATES


# ------------------------------------------------------------------------------- what is counted


def flops(op: str, backend: str, shape: Shape) -> float:
    return sum(p.flops for p in work(op, backend, shape, 4, training=False).products)


def test_dense_multiplies_for_all_experts_and_grouped_for_the_chosen() -> None:
    row = 2 * SHAPE.rank * (SHAPE.in_features + SHAPE.out_features)
    assert flops("lora_mix", "dense", SHAPE) == SHAPE.rows * SHAPE.num_experts * row
    assert flops("lora_mix", "grouped", SHAPE) == SHAPE.rows * SHAPE.slots * row
    many = replace(SHAPE, num_experts=512)  # sorted by slot, no longer by set
    assert flops("lora_mix", "grouped", many) == SHAPE.rows * SHAPE.slots * row
    assert flops("lora_mix", "dense", many) == SHAPE.rows * 512 * row


def test_a_shared_A_is_multiplied_once() -> None:
    shared = replace(SHAPE, shared_A=True)
    saved = 2 * SHAPE.rows * SHAPE.in_features * SHAPE.rank * (SHAPE.num_experts - 1)
    assert flops("lora_mix", "dense", shared) == flops("lora_mix", "dense", SHAPE) - saved


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", KNOWN)
def test_training_is_two_more_products_for_each_and_more_bytes(op: str, backend: str) -> None:
    forward = work(op, backend, SHAPE, 2, training=False)
    both = work(op, backend, SHAPE, 2, training=True)
    multiplied = [sum(p.flops for p in counted.products) for counted in (forward, both)]
    assert multiplied[1] == 3 * multiplied[0]
    assert both.bytes > forward.bytes > 0


@pytest.mark.parametrize(
    ("op", "backend"),
    # einsum multiplies the four operands of the other reference in an order of its own
    [("lora_mix", "dense"), ("lora_rows", "dense"), ("lora_mix", "reference")],
)
def test_products_are_those_that_torch_counts(op: str, backend: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape(12, 10, 6, num_experts=4, rank=3, slots=2)
    call = calibrate._call(Case(op, shape, torch.float32, "cpu", True), BACKENDS[backend])
    with FlopCounterMode(display=False) as counter:
        call()
    counted = work(op, backend, shape, 4, training=True)
    assert sum(product.flops for product in counted.products) == counter.get_total_flops()


def test_the_rate_is_between_those_of_the_nearest_sizes() -> None:
    points = ((8, 10.0), (16, 20.0), (64, 60.0))
    dtype = DtypeFigures({"plain": points, "grouped": points}, {})
    found = [cost.rate(Product(n, 10**4, 10**4), dtype) for n in (4, 8, 16, 32, 64, 10**3)]
    assert found == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


def test_tensors_that_fit_no_cache_add_to_the_time() -> None:
    dtype = DtypeFigures({"plain": ((1, 1e15),), "grouped": ((1, 1e15),)}, {})
    by_size = ((2**20, 4e9), (2**22, 4e9), (2**26, 1e9))
    device = DeviceFigures("a test", by_size, group=0.0, dtypes={"float32": dtype})
    small, between, large = (
        cost.counted_seconds(Work((), 8e6, largest=size), device, dtype)
        for size in (2**19, 2**24, 2**27)
    )
    assert small == (8e6 / 4e9, 0)
    assert between == (8e6 / 4e9, pytest.approx(8e6 / 2.5e9 - 8e6 / 4e9))
    assert large == (8e6 / 4e9, pytest.approx(8e6 / 1e9 - 8e6 / 4e9))
    # a product's rate holds for results that fit; larger ones take longer by their writing
    fits, more = (
        cost.counted_seconds(Work((Product(1024, rows, 1),), 0), device, dtype)[1]
        for rows in (64, 2**15)
    )
    assert fits == 0
    assert more == pytest.approx(2**27 / 1e9 - 2**27 / 4e9)


def test_each_group_of_a_grouped_product_costs_what_the_figures_say() -> None:
    dtype = DtypeFigures({"plain": ((1, 1e9),), "grouped": ((1, 1e9),)}, {})
    device = DeviceFigures("a test", bandwidth=((1, 1e9),), group=0.5, dtypes={"float32": dtype})
    counted = work("lora_rows", "grouped", SHAPE, 4, training=False)
    free = replace(device, group=0.0)
    with_groups, without = (cost.counted_seconds(counted, d, dtype)[0] for d in (device, free))
    assert with_groups - without == pytest.approx(2 * 8 * 0.5)


# ----------------------------------------------------------------------------------- the chooser


def test_the_chooser_returns_backends_of_its_table_and_reads_figures_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = []
    monkeypatch.setattr(
        cost, "load_calibration", lambda: reads.append(1) or flat(grouped=1, dense=2)
    )
    chooser = cost.Chooser(BACKENDS)
    for rows in (1, 2, 3):
        for op in OPS:
            assert chooser.choose(op, rows=rows, **SIZES) is BACKENDS["grouped"]
    assert reads == [1]
    dense = {"dense": BACKENDS["dense"]}
    assert (
        cost.Chooser(dense, chooser.calibration).choose("lora_mix", rows=1, **SIZES).name == "dense"
    )


def test_in_training_the_choice_is_that_of_every_other_process() -> None:
    chooser = cost.Chooser(BACKENDS)
    rows = (1, 7, 64, 470, 471, 5000, 10**5)
    training, forward = (
        {chooser.choose("lora_mix", rows=n, **SIZES, training=mode).name for n in rows}
        for mode in (True, False)
    )
    assert training == {cost.choose("lora_mix", rows=cost.TRAINING_ROWS, **SIZES)}
    assert len(forward) > 1


def test_under_compile_the_choice_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = cost.Chooser(BACKENDS, flat(grouped=1, dense=2))
    assert chooser.choose("lora_mix", rows=1, **SIZES).name == "grouped"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chooser.choose("lora_mix", rows=1, **SIZES).name == "dense"


def test_few_rows_and_many_rows_have_different_backends_on_the_shipped_figures() -> None:
    options = {**SIZES, "training": False}
    chosen = {rows: cost.choose("lora_mix", rows=rows, **options) for rows in (1, 4096)}
    assert chosen == {1: "gather", 4096: "grouped"}


# --------------------------------------------------------------------------------------- files


def test_a_saved_calibration_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "calibration.json"
    shipped().save(path)
    assert Calibration.load(path).text() == shipped().text()
    other = flat(dense=1.0)
    other.save(path)
    assert Calibration.load(path).text() == other.text() != shipped().text()


def altered(change: Callable[[dict[str, Any]], object]) -> str:
    values = json.loads(shipped().text())
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a table"),
        ('{"version": 1}', r"\['devices'\] is missing"),
        (altered(lambda v: v.update(version=2)), "version 2 is not 1"),
        (altered(lambda v: v.update(speed=2)), r"unknown \['speed'\]"),
        (altered(lambda v: v["devices"]["cpu"].pop("group_us")), "'group_us'.* is missing"),
        (altered(lambda v: v["devices"]["cpu"].update(gb_per_s_by_mib={})), "must be sizes"),
        (
            altered(lambda v: v["devices"]["cpu"].update(gb_per_s_by_mib={"4": 0})),
            "positive number",
        ),
        (altered(lambda v: v["devices"]["cpu"].update(group_us="1")), r"0 or more \(got '1'\)"),
        (altered(lambda v: v["devices"]["cpu"]["dtypes"].update(int8={})), r"unknown \['int8'\]"),
        (
            altered(
                lambda v: v["devices"]["cpu"]["dtypes"]["float32"]["backends"].update(lora_mux={})
            ),
            r"unknown \['lora_mux'\]",
        ),
        (
            altered(
                lambda v: v["devices"]["cpu"]["dtypes"]["float32"]["gflop_per_s"].update(
                    plain={"wide": 1.0}
                )
            ),
            "must be sizes",
        ),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        Calibration.load(path)
    assert "calibration.json" in str(caught.value)
    assert "molora bench --calibrate" in str(caught.value)


def test_the_users_file_takes_the_place_of_the_devices_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert user_file() == tmp_path / "molora" / "calibration.json"
    assert load_calibration() is shipped()
    flat(dense=1.0).save(user_file())
    found = load_calibration()
    assert found.devices["cpu"].source == "a test"
    assert found.devices["cuda"] is shipped().devices["cuda"]
    user_file().write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_calibration()


def test_without_a_folder_for_configuration_the_file_is_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_file() == tmp_path / ".config" / "molora" / "calibration.json"


def test_the_shipped_figures_say_where_they_are_from_and_what_follows() -> None:
    cpu, cuda = (shipped().devices[name] for name in ("cpu", "cuda"))
    assert "measured" in cpu.source
    assert cuda.source.startswith("derived, not measured")
    derived = Calibration({"cuda": datasheet.figures(datasheet.A100)})
    assert Calibration({"cuda": cuda}).text() == derived.text()
    for name, dtype in cpu.dtypes.items():
        lines = calibrate.described(Effort(), getattr(torch, name), "cpu", shipped())
        assert list(dtype.crossovers) == list(lines)


# --------------------------------------------------------------------------------- measurement


def test_a_line_is_fitted_through_times_and_not_pulled_by_one_that_was_disturbed() -> None:
    near = [1e-5 * 2**i for i in range(9)]
    points = [(c, c * (i > 5), 1.5 * c + 3 * c * (i > 5) + 4e-5) for i, c in enumerate(near)]
    points[4] = (*points[4][:2], 20 * points[4][2])
    line = fit(points)
    assert line.scale == pytest.approx(1.5, rel=0.2)
    assert line.spill == pytest.approx(3, rel=0.2)
    assert line.fixed == pytest.approx(4e-5, rel=0.2)


@pytest.mark.parametrize(("scale", "fixed"), [(2.0, 0.0), (0.0, 3e-5)])
def test_a_line_may_have_no_constant_or_no_slope(scale: float, fixed: float) -> None:
    line = fit([(c, 0.0, scale * c + fixed) for c in (1e-5, 1e-4, 1e-3)])
    assert (line.scale, line.fixed) == (pytest.approx(scale), pytest.approx(fixed))


def test_a_backend_that_needs_too_large_a_tensor_is_left_out() -> None:
    case = Case("lora_mix", Shape(64, 8, 8, 4, 8, 2), torch.float32, "cpu", training=False)
    table = {name: BACKENDS[name] for name in ("dense", "gather")}

    def timed(largest: int) -> set[str]:
        return {found.backend for found in time_case(case, 1, table=table, largest=largest)}

    assert timed(2**20) == {"dense", "gather"}
    assert timed(64 * 8 * 4) == {"dense"}


def test_every_backend_that_can_run_is_timed_side_by_side() -> None:
    ticks = iter(range(10**6))
    case = Case("lora_mix", Shape(3, 8, 8, 4, 8, 2), torch.float64, "cpu", training=True)
    times = time_case(case, 2, clock=lambda: float(next(ticks)))
    names = {timed.backend for timed in times}
    assert {"reference", "dense"} <= names <= set(BACKENDS) - {"grouped", "triton"}
    assert all(timed.rounds == (1.0, 1.0) for timed in times)
    with pytest.raises(BackendError, match="runs=0 measures nothing"):
        time_case(case, 0)


@pytest.mark.parametrize("op", OPS)
def test_a_timed_call_trains_all_inputs_or_none(op: str) -> None:
    case = Case(op, Shape(3, 8, 8, 4, 8, 2), torch.float32, "cpu", training=True)
    seen: list[list[bool]] = []

    def note(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append([t.requires_grad for t in inputs if t.is_floating_point()])
        return sum(t.sum() for t in inputs)  # type: ignore[return-value]

    backend = replace(BACKENDS["dense"], lora_mix=note, lora_rows=note)
    for training in (True, False):
        time_case(replace(case, training=training), 1, table={"dense": backend})
    *trained, scaling = seen[0]
    assert all(trained)
    assert not scaling
    assert not any(seen[-1])


def test_a_calibration_is_measured_saved_and_chosen_from(tmp_path: Path) -> None:
    effort = Effort(hidden=(16,), experts=(4,), tokens=(1, 8), rank=8, runs=1)
    lines: list[str] = []
    calibration, times = calibrate.calibrate(
        effort,
        device="cpu",
        dtypes=[torch.float32],
        source="measured in a test",
        progress=lines.append,
    )
    calibration.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    (dtype,) = loaded.devices["cpu"].dtypes.values()
    modes = {(op, name, mode) for op, name, mode in dtype.lines}
    expected = set(BACKENDS) - {"reference", "triton"}
    assert modes == {(o, n, m) for o in OPS for n in expected for m in ("forward", "training")}
    assert len(times) == len(OPS) * 2 * 2 * len(expected)
    assert len(dtype.crossovers) == len(OPS) * 2
    assert dtype.crossovers[0].startswith("lora_mix, forward, 16 to 16, top-2 of 4 experts of rank")
    assert cost.choose("lora_mix", rows=5, **SIZES, calibration=loaded) in expected
    assert lines == ["products in float32", "lora_mix in float32", "lora_rows in float32"]

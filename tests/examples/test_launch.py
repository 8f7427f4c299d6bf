"""The scripts of examples/launch start the same job, here on two CPU processes with gloo."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from launched_runs import end, start, write_run
from launches import ROOT, free_port

from molora.train.__main__ import parser

SCRIPTS = ROOT / "examples" / "launch"

# srun starts every task with Slurm's variables; these are what tasks of one step get
SRUN = """#!/usr/bin/env bash
[[ "$1" == --kill-on-bad-exit=1 ]] || exit 99
shift
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_TASKS_PER_NODE="1(x2)"
SLURM_PROCID=1 SLURM_LOCALID=0 "$@" & other=$!
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" || exit
wait "$other"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[1-2]" ]] || exit 99
printf '127.0.0.1\\nsecond\\n'
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    base = tiny_runs.save_base(folder / "base", initializer_range=0.5)
    return write_run(folder / "run", base, train={"deepspeed": "zero2"})


@pytest.fixture(scope="module")
def expected(run_file: Path) -> dict[str, bytes]:
    """The mixture that `molora train --nproc 2` makes."""
    output = run_file.parent / "expected"
    command = [sys.executable, "-m", "molora", "train", run_file, "--nproc", 2]
    code, _, err = end(start(*command, f"--output-dir={output}"))
    assert code == 0, err
    return mixture_of(output)


def mixture_of(output: Path) -> dict[str, bytes]:
    """The files of a run's mixture; their tensors' name is the hash of what is in them."""
    return {path.name: path.read_bytes() for path in (output / "adapter").iterdir()}


def run_script(name: str, *arguments: object, **variables: str) -> None:
    code, out, err = end(start(SCRIPTS / name, *arguments, "--quiet", **variables))
    assert code == 0, f"{out[-3000:]}\n{err[-6000:]}"


@pytest.mark.distributed
@pytest.mark.slow
def test_single_node(run_file: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    port = str(free_port())
    run_script("single_node.sh", run_file, f"output_dir={tmp_path}", GPUS="2", MASTER_PORT=port)
    assert mixture_of(tmp_path) == expected


@pytest.mark.distributed
@pytest.mark.slow
def test_several_nodes_by_a_hostfile(
    run_file: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    # without ssh, as on machines that have none: the script once per node
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("first slots=1\nsecond slots=1\n", encoding="utf-8")
    common = {
        "HOSTFILE": str(hostfile),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    nodes = [
        start(
            *(SCRIPTS / "several_nodes.sh", run_file, f"output_dir={tmp_path}", "--quiet"),
            NODE_RANK=str(rank),
            **common,
        )
        for rank in range(2)
    ]
    for code, out, err in [end(node) for node in nodes]:
        assert code == 0, f"{out[-3000:]}\n{err[-6000:]}"
    assert mixture_of(tmp_path) == expected


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.usefixtures("expected")
def test_zero3_with_offload(run_file: Path, tmp_path: Path) -> None:
    port = str(free_port())
    run_script("zero3_offload.sh", run_file, f"output_dir={tmp_path}", GPUS="2", MASTER_PORT=port)
    engine = (tmp_path / "deepspeed.json").read_text("utf-8")
    assert '"stage": 3' in engine
    assert '"offload_param"' in engine
    assert [line["loss"] for line in tiny_runs.lines(tmp_path / "metrics.jsonl", "train")] == (
        pytest.approx(losses_of(run_file.parent / "expected"), abs=1e-4)
    )


def losses_of(output: Path) -> list[float]:
    found = [line["loss"] for line in tiny_runs.lines(output / "metrics.jsonl", "train")]
    assert len(found) == 4
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun(run_file: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    run_script("torchrun.sh", run_file, f"output_dir={tmp_path}", GPUS="2")
    assert mixture_of(tmp_path) == expected


@pytest.mark.distributed
@pytest.mark.slow
def test_slurm(run_file: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    output = tmp_path / "out"
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(free_port() - 20_000)}
    run_script("slurm.sh", run_file, f"output_dir={output}", PATH=path, **slurm)
    assert mixture_of(output) == expected


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.stem)
def test_a_script_is_sound(script: Path) -> None:
    text = script.read_text("utf-8")
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    # no word splitting: variables stand in quotes, or where bash splits nothing
    subprocess.run(["bash", "-n", script], check=True)
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert "exec " in code[-1]
    assert '"$@"' in code[-1]
    if program := shutil.which("shellcheck"):
        subprocess.run([program, script], check=True)


def test_every_script_is_on_the_page_and_every_option_exists() -> None:
    page = (SCRIPTS / "README.md").read_text("utf-8")
    named = set(re.findall(r"`(?:sbatch )?(\w+\.sh)", page))
    assert named == {path.name for path in SCRIPTS.glob("*.sh")}
    known = {option for action in parser()._actions for option in action.option_strings}
    assert {"--resume", "--quiet", "--output-dir", "--local_rank"} <= known

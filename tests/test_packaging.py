"""What is declared, pinned, licensed and kept in the repository fits together."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import molora

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {"train", "viz", "track", "compose", "dev"}
LARGEST_FILE = 1_000_000

# Written in two parts, so that this file does not hold what it looks for.
FORBIDDEN_IN_FILES = [
    r"(?<![\w.~])/" + r"(work|root|tmp)/",
    r"(?<![\w.~])/" + r"home/\w+/",
    r"pypi\." + r"org|python" + r"hosted\.org|registry\." + r"npmjs|deb\." + r"debian\.org",
    r"download\." + r"pytorch\.org",
]


def setup_cfg() -> ConfigParser:
    parser = ConfigParser()
    parser.read_string((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    return parser


def requirements(lines: str) -> list[Requirement]:
    return [Requirement(line) for line in lines.splitlines() if line.strip()]


def declared() -> list[Requirement]:
    config = setup_cfg()
    lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    return requirements("\n".join(lines))


def pins(text: str) -> dict[str, Version]:
    found: dict[str, Version] = {}
    for requirement in requirements(re.sub(r"#.*", "", text)):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is not an exact pin"
        found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def unsatisfied(wanted: list[Requirement], pinned: dict[str, Version]) -> list[str]:
    """The requirements that the pins leave open or contradict."""
    return [
        str(requirement)
        for requirement in wanted
        if (name := canonicalize_name(requirement.name)) not in pinned
        or not requirement.specifier.contains(pinned[name], prereleases=True)
    ]


def needed_by(wanted: list[Requirement]) -> set[str]:
    """The names of all installed packages that these requirements bring, theirs included."""
    seen: set[tuple[str, str]] = set()
    queue = list(wanted)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # for another platform or Python
        for extra in ["", *requirement.extras]:
            if (name, extra) not in seen:
                seen.add((name, extra))
                further = map(Requirement, package.requires or [])
                queue += [r for r in further if not r.marker or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def tracked_files() -> list[Path]:
    """What git tracks or would track; without git, all that .gitignore does not name."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = list(_walk(ROOT, [".git", *ignored_patterns()]))
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _walk(folder: Path, ignored: list[str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern.rstrip("/")) for pattern in ignored):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, ignored)
        else:
            yield path


def ignored_patterns() -> list[str]:
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def forbidden_in(text: str) -> list[str]:
    return [
        f"line {number}: {found.group()}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern in FORBIDDEN_IN_FILES
        if (found := re.search(pattern, line))
    ]


def test_constraints_satisfy_every_declared_requirement() -> None:
    pinned = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert len(declared()) > 15
    assert unsatisfied(declared(), pinned) == []


@pytest.mark.parametrize("pin", ["torch==2.9.1", "torch==3.0", "numpy==2.4.6"])
def test_a_pin_outside_the_window_or_missing_is_found(pin: str) -> None:
    assert unsatisfied(requirements("torch>=2.10,<3"), pins(pin)) == ["torch<3,>=2.10"]


def test_constraints_pin_every_package_that_the_installation_brings() -> None:
    pinned = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    needed = needed_by(declared())
    assert {"markupsafe", "tokenizers"} <= needed  # nobody declares these; they come along
    # The CUDA builds of torch name their own exact versions of these.
    by_torch = {
        name for name in needed if name == "triton" or name.startswith(("nvidia-", "cuda-"))
    }
    assert sorted(needed - set(pinned) - by_torch) == []


def test_constraints_pin_no_local_build() -> None:
    pinned = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert {name for name, version in pinned.items() if version.local} == set()
    assert pins("torch==2.13.0+cpu")["torch"].local == "cpu"


def test_metadata_fits_the_code_and_the_tools() -> None:
    config = setup_cfg()
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(tools) == {"build-system", "tool"}  # metadata has one home, setup.cfg
    assert config["metadata"]["version"] == molora.__version__
    assert config["metadata"]["license"] == "Apache-2.0"
    assert set(config["options.extras_require"]) == EXTRAS
    assert "molora = molora.cli:main" in config["options.entry_points"]["console_scripts"]
    oldest = config["options"]["python_requires"].removeprefix(">=")
    assert tools["tool"]["mypy"]["python_version"] == oldest
    assert tools["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "molora" / "py.typed").is_file()
    assert "py.typed" in setup_cfg()["options.package_data"]["molora"]


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "\n   9. Accepting Warranty or Additional Liability." in text


def test_pre_commit_hooks_are_local() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}


def test_gitignore_covers_the_environment_and_the_results() -> None:
    assert {".venv/", "runs/", "__pycache__/", "*.egg-info/"} <= set(ignored_patterns())


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    breaches = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # binary: golden tensors, pictures
        breaches += [f"{path.relative_to(ROOT)}: {found}" for found in forbidden_in(text)]
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("see /" + "work/shared", True),
        ("open('/" + "tmp/x')", True),
        ("/" + "home/ann/models", True),
        ("https://pypi." + "org/simple", True),
        ("tests/work/shared and ~/work/x", False),
        ("https://arxiv.org/abs/2404.15159", False),
    ],
)
def test_registries_and_machine_paths_are_recognised(text: str, bad: bool) -> None:
    assert bool(forbidden_in(text)) is bad


def test_no_file_is_large() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked_files()}
    assert {"setup.cfg", "molora/errors.py"} <= set(sizes)
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE} == {}

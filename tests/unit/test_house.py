"""The rules of the house (CONTRIBUTING.md), read from the source itself."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "rm_scale"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Data flows one way: a package imports itself and those before it.
PACKAGES = (
    "config_names",
    "config_schedules",
    "config_trl",
    "config_columns",
    "config",
    "config_sources",
    "config_rules",
    "config_parsing",
    "config_help",
    "known_models",
    "tiers",
    "planning",
    "overlap",
    "data",
    "batching",
    "modeling",
    "training",
    "inference",
    "evaluation",
    "data_review",
    "contamination",
    "reporting",
    "launch",
    "slurm",
    "demo",
    "doctor",
    "hardware_bench",
    "training_run",
    "train",
    "api",
    "commands",
    "cli",
)
ANYWHERE = (
    *("version", "errors", "logs", "files", "texts", "json_values", "yaml_files", "output_paths", "output_lock"),
    *("network", "meeting", "distributed", "long_work", "guard"),
)
# Entries: nothing may import them but the command line.
ENTRIES = {"train": {"api", "commands"}, "api": set(), "cli": set(), "commands": {"cli"}}


def package_of(path: Path) -> str:
    """The first name of a file's path below `rm_scale`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "rm_scale" else [module]
            yield from ((node.lineno, name) for name in names)


def allowed_packages(package: str) -> set[str]:
    """The packages that `package` may import from."""
    if package in ANYWHERE:
        return set(ANYWHERE)
    before = PACKAGES[: PACKAGES.index(package)]
    return {package, *ANYWHERE, *(name for name in before if package in ENTRIES.get(name, {package}))}


def import_problems(path: Path, source: str) -> list[str]:
    """Imports of `source`, to be read as the file `path`, that go against the direction."""
    package = package_of(path)
    if package == "__init__":
        allowed = {"api", "inference", "version"}  # the Python API, loaded when it is asked for
    elif package in {*PACKAGES, *ANYWHERE}:
        allowed = allowed_packages(package)
    else:
        return [f"{package}: an unknown package. Fix: put it where it belongs in PACKAGES and in docs/architecture.md"]
    problems = []
    for line, name in imported_names(ast.parse(source)):
        parts = name.split(".")
        if parts[0] == "":
            problems.append(f"{path.name}:{line}: relative import. Fix: from rm_scale.package import ...")
        elif parts[0] == "rm_scale" and len(parts) > 1 and not parts[1].startswith("__") and parts[1] not in allowed:
            problems.append(
                f"{path.name}:{line}: {package} imports {name}. Fix: {package} may import {sorted(allowed)}"
            )
    return problems


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    assert import_problems(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "line", "bad"),
    [
        ("data/x.py", "from rm_scale.training.trainer import a", True),
        ("data/x.py", "def f():\n    import rm_scale.training.trainer", True),
        ("data/x.py", "from rm_scale import training", True),
        ("data/x.py", "from . import groups", True),
        ("reporting/x.py", "from rm_scale.training_run import a", True),
        ("launch/x.py", "from rm_scale.train import main", True),
        ("training_run.py", "from rm_scale.commands.score import run", True),
        ("commands/x.py", "from rm_scale.cli import main", True),
        ("commands/x.py", "from rm_scale.train import main", False),
        ("api.py", "from rm_scale.train import main", False),
        ("commands/x.py", "from rm_scale.api import train_reward_model", True),
        ("errors.py", "from rm_scale.config import RunConfig", True),
        ("planing/x.py", "", True),
        ("training/x.py", "from rm_scale.data.preference_group import a", False),
        ("data/x.py", "from rm_scale import __version__", False),
        ("config.py", "from rm_scale.errors import ConfigError", False),
        ("cli.py", "from rm_scale.commands import plan", False),
    ],
)
def test_the_import_rule_itself(file: str, line: str, bad: bool) -> None:
    """The check above sees what it must see."""
    assert bool(import_problems(PACKAGE / file, line)) is bad


def test_planning_is_pure_arithmetic() -> None:
    """Planning must work on a login node, in a moment: no torch, wherever it is imported."""
    for path in (PACKAGE / "planning").rglob("*.py"):
        names = {name.split(".")[0] for _, name in imported_names(ast.parse(path.read_text(encoding="utf-8")))}
        assert not names & {"torch", "deepspeed", "peft", "trl", "accelerate", "bitsandbytes"}, path.name


def test_no_module_shadows_another() -> None:
    """`deepspeed rm_scale/train.py` puts rm_scale/ first on sys.path, so these are top-level names there."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) - {"rm_scale"}
    entries = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    names = {path.stem for path in entries} - {"__init__"}
    assert names & taken == set(), "rename these: a script in rm_scale/ would import them instead of the real ones"


def test_train_is_a_table_of_contents() -> None:
    """Short, and `main` is all it defines, as it runs as a second copy of itself under the name __main__."""
    source = (PACKAGE / "train.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    body = ast.parse(source).body
    defined = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    assert defined == ["main"]
    assert not [node for node in body if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)]


@pytest.mark.parametrize("module", ["rm_scale", "rm_scale.config", "rm_scale.tiers", "rm_scale.api", "rm_scale.cli"])
def test_import_without_torch(module: str) -> None:
    """A command's help and a typo in a setting must not cost the seconds that torch takes to import."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr or f"import {module} imports torch or transformers"


def test_constraints_cover_every_dependency() -> None:
    """Each dependency is pinned, to a version in the range we declare."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    for text in [*project["dependencies"], *extras]:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
            continue  # an extra that takes in others
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pin), f"constraints.txt has {requirement.name} {pin}, not in {text}"
        assert "+" not in pin, "a pin names no build: CPU and CUDA machines share the file"


def test_quality_and_pre_commit_check_the_same() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    quality = makefile.partition("\nquality:")[2].partition("\n\n")[0]
    for check in ("ruff check", "ruff format", "mypy", "deptry", "shellcheck"):
        assert re.search(rf"\b{check}\b", quality), f"make quality lacks {check}"
        assert re.search(rf"\b{check}\b", hooks), f"pre-commit lacks {check}"


def test_wheel_ships_the_ready_files(tmp_path: Path) -> None:
    """`pip install rm-scale` users have configs/, ds_configs/ and slurm/ too."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "ds_configs", "slurm"):
        for path in (REPOSITORY / folder).rglob("*.*"):
            if path.is_file() and not path.name.endswith(".local.env"):
                assert f"rm_scale/shipped/{path.relative_to(REPOSITORY).as_posix()}" in inside
    for path in MODULES:
        assert path.relative_to(REPOSITORY).as_posix() in inside
    assert not [name for name in inside if name.startswith(("tests/", "tools/", "benchmarks/"))]

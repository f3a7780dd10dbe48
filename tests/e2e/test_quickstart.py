"""docs/quickstart.md followed to the letter, one command after the other in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import REPOSITORY, environment, read_json, read_lines

pytestmark = [pytest.mark.e2e, pytest.mark.long]

PAGE = (REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8")
# Left out: the environment (it is there), what needs a network or an account, and parts of command lines.
NOT_RUN = (
    "make venv",
    ". .venv",
    "smollm2",
    "wandb",
    "WANDB",
    "push_to_hub",
    "[rm_scale",
    "    --",
    "# then",
)  # four spaces: a line of its own


def commands() -> list[str]:
    """The page's indented command lines, continued ones joined."""
    blocks = re.findall(r"(?:^    .*\n)+", re.sub(r"^```.*?^```\n", "", PAGE, flags=re.M | re.S), re.M)
    lines = [line[4:] for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [line for line in lines if not any(part in f"    {line}" for part in NOT_RUN)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the repository's files lie where the page says."""
    place = tmp_path_factory.mktemp("quickstart")
    for name in ("rm_scale", "configs", "ds_configs"):
        (place / name).symlink_to(REPOSITORY / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(PATH=path, XDG_CACHE_HOME=str(place / "cache"), PYTHONPATH=str(REPOSITORY))
    for command in commands():
        command = command.replace("deepspeed rm_scale", "deepspeed --num_accelerators 2 rm_scale")
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", command],
            cwd=place,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return place


def test_the_page_has_its_commands() -> None:
    found = "\n".join(commands())
    for part in (
        "write_synthetic",
        "assets tiny",
        "rm-scale data",
        "--dry_run",
        "deepspeed",
        "report",
        "score",
        "export",
    ):
        assert part in found


def test_the_model_has_learnt(folder: Path) -> None:
    evaluation = read_json(folder / "outputs" / "mine" / "run" / "evaluation.json")
    assert evaluation["accuracy_ci95"][0] > 0.5, evaluation
    names = [line["name"] for line in read_lines(folder / "outputs" / "mine" / "run" / "warnings.jsonl")]
    assert not {"worse_than_chance", "not_better_than_chance", "accuracy_stuck"} & set(names)


def test_what_the_page_says_is_there(folder: Path) -> None:
    assert "<h2>Learning</h2>" in (folder / "outputs" / "mine" / "report.html").read_text()
    assert len(read_lines(folder / "scores.jsonl")) == 2
    assert (folder / "outputs" / "mine-plain" / "model.safetensors").is_file()

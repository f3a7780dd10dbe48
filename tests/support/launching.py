"""Start `rm_scale/train.py` as a user does, and read what it left."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.files import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "rm_scale" / "train.py"
CASE_RUNNER = REPOSITORY / "tests" / "support" / "case_runner.py"
FAULT_RUNNER = REPOSITORY / "tests" / "support" / "fault_runner.py"


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    output: str


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without the traces of an earlier launcher, on CPU."""
    drop = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_DEEPSPEED"}
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return {**kept, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def run(
    command: list[str], timeout: float = 1200, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Finished:
    """Run a command to its end; output and errors come together."""
    done = subprocess.run(
        command,
        env=env or environment(),
        cwd=cwd or REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    return Finished(done.returncode, done.stdout)


def deepspeed_command(script: Path, *arguments: str, ranks: int = 2) -> list[str]:
    """The words of `deepspeed --num_accelerators N script ...`, started with this Python."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), str(script), *arguments]


def run_cases(
    folder: Path,
    cases: dict[str, list[str]],
    ranks: int = 2,
    timeout: float = 1200,
    env: dict[str, str] | None = None,
    runner: Path = CASE_RUNNER,
) -> Finished:
    """Train several cases one after the other in the same processes, under the real launcher.

    Each case runs `rm_scale.train.main` with its own flags and writes to `folder / name`, unless its flags say where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = {
        name: flags if "--output_dir" in flags else [*flags, "--output_dir", str(folder / name)]
        for name, flags in cases.items()
    }
    (folder / "cases.json").write_text(json.dumps(todo))
    finished = run(deepspeed_command(runner, str(folder / "cases.json"), ranks=ranks), timeout, env)
    (folder / "log.txt").write_text(finished.output)
    return finished


class Launches:
    """Cases that share launches: each group of cases is trained in one launch, when a case of it is first asked for.

    Args:
        folder: each case writes to `folder / case`.
        groups: cases and their flags, as for `run_cases`, by group.
        ranks: of every launch.
        env: of the processes.
        runner: the script that trains a launch's cases.
    """

    def __init__(
        self,
        folder: Path,
        groups: dict[str, dict[str, list[str]]],
        ranks: int = 2,
        env: dict[str, str] | None = None,
        runner: Path = CASE_RUNNER,
    ) -> None:
        self.folder, self._groups, self._ranks, self._env, self._runner = folder, groups, ranks, env, runner
        self._launched: dict[str, str] = {}

    def __getitem__(self, case: str) -> Path:
        self.log_of(case)
        return self.folder / case

    def log_of(self, case: str) -> str:
        """Return what the launch of this case printed."""
        group = next(name for name, cases in self._groups.items() if case in cases)
        if group not in self._launched:
            finished = run_cases(
                self.folder, self._groups[group], ranks=self._ranks, env=self._env, runner=self._runner
            )
            assert finished.code == 0, finished.output[-6000:]
            self._launched[group] = finished.output
        return self._launched[group]


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file, compressed when its name ends in .gz."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def losses(run_folder: Path) -> list[float]:
    """The logged training losses of a run."""
    return [line["loss"] for line in read_lines(run_folder / "run" / "metrics.jsonl") if "loss" in line]


def scores(run_folder: Path) -> list[float]:
    """All rewards of a run's final evaluation, in the data set's order."""
    return [reward for line in read_lines(run_folder / "run" / "evaluation_scores.jsonl") for reward in line["rewards"]]


def run_faulty_cases(
    folder: Path, cases: dict[str, dict[str, Any]], ranks: int = 2, timeout: float = 1200
) -> tuple[Finished, list[dict[str, int]]]:
    """Train cases that meet faults (see `tests/support/fault_runner.py`); gives the exit codes of each rank too.

    A case is `{"flags": [...], "faults": [...]}`, and `"in": NAME` when it goes on in the folder of an earlier one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = {}
    for name, case in cases.items():
        output = folder / case.get("in", name)
        todo[name] = {"faults": [], **case, "flags": [*case["flags"], "--output_dir", str(output)]}
    (folder / "cases.json").write_text(json.dumps(todo))
    finished = run(deepspeed_command(FAULT_RUNNER, str(folder / "cases.json"), ranks=ranks), timeout)
    (folder / "log.txt").write_text(finished.output)
    files = sorted(folder.glob("codes-*.json"))
    return finished, [read_json(path) for path in files]


def case_log(folder: Path, name: str) -> str:
    """What one case of `run_faulty_cases` printed."""
    text = (folder / "log.txt").read_text()
    return text.partition(f"=== case {name}\n")[2].partition("=== case")[0]


def weights(run_folder: Path) -> dict[str, Any]:
    """All saved tensors of a run's model or adapter."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(run_folder.glob("*.safetensors")):
        found |= load_file(file)
    assert found, f"{run_folder} holds no weights"
    return found

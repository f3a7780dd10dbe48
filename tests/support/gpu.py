"""Real runs on CUDA devices: how they are started, on which devices, and what is written down inside them.

Every process that a GPU test starts goes through here and inherits this one's environment. So the same tests can be
rehearsed on a machine without a card, as far as `tests/support/cuda_standin` goes, by

    python -m tests.support.gpu -k "not many_gpus" tests/gpu
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_scale.files import free_port
from tests.support import launching
from tests.support.launching import REPOSITORY, TRAIN, Finished, read_json

WATCHED_RUN = REPOSITORY / "tests" / "gpu" / "watched_run.py"
CLI = [sys.executable, "-m", "rm_scale.cli"]

NUM_DEVICES = torch.cuda.device_count() if torch.cuda.is_available() else 0
RANKS = max(1, min(2, NUM_DEVICES))
"""Ranks of a test that wants more than one where there are several devices: two show all that eight do."""

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(NUM_DEVICES == 0, reason="needs a CUDA device")]
needs_two = pytest.mark.skipif(
    NUM_DEVICES < 2,
    reason=f"needs 2 CUDA devices, {NUM_DEVICES} here: nothing is shown about NCCL, stopped ranks or DataParallel",
)


def environment(**extra: str) -> dict[str, str]:
    """This process's environment for a run that sees its CUDA devices: without what tests on a CPU set."""
    env = launching.environment()
    # One thread per rank is for tests that share two cores; left alone a run divides the cores by itself.
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        env.pop(name, None)
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    return {**env, **extra}


def visible_devices() -> list[str]:
    """Names under which the devices of this process can be given to another, as in CUDA_VISIBLE_DEVICES."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named or [str(index) for index in range(NUM_DEVICES)]


def launched(script: Path, *arguments: str, ranks: int = RANKS) -> list[str]:
    """The words of the deepspeed launcher for a script, on the first devices that this process sees.

    With a number of devices the launcher ignores CUDA_VISIBLE_DEVICES and takes the machine's first ones, which may be
    somebody else's; it takes their names, if these are numbers. Others are left to torchrun.
    """
    names = visible_devices()[:ranks]
    if all(name.isdigit() for name in names):
        launcher = ["deepspeed.launcher.runner", "--include", f"localhost:{','.join(names)}"]
        return [sys.executable, "-m", *launcher, "--master_port", str(free_port()), str(script), *arguments]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", *launcher, str(script), *arguments]


def run(command: list[str], timeout: float = 600, **variables: str) -> Finished:
    """Run a command to its end with the devices in sight."""
    return launching.run(command, timeout, environment(**variables))


def rm_scale(*words: str, timeout: float = 600, **variables: str) -> Finished:
    """A command of `rm-scale`, as a user types it."""
    return run([*CLI, *words], timeout, **variables)


def small_run(model: Path, *data: Path) -> list[str]:
    """Settings of a run of seconds: 5 steps in bf16, every one logged, 21 groups held out."""
    words = ["--model_name_or_path", str(model), "--dataset_path", *map(str, data), "--eval_split_size", "21"]
    words += ["--max_steps", "5", "--learning_rate", "1e-3", "--logging_steps", "1", "--per_device_train_batch_size"]
    return [*words, "3", "--sample_scores", "0", "--disable_tqdm"]


METHODS: dict[str, list[str]] = {
    "full": [],
    "lora": ["--use_peft"],
    "qlora": ["--use_peft", "--load_in_4bit", "--use_bnb_nested_quant"],
}
"""What a run is given on top, by method."""


def run_watched(
    folder: Path, cases: dict[str, dict[str, Any]], ranks: int = RANKS, timeout: float = 900, **variables: str
) -> Finished:
    """Train cases one after the other in the same processes, with what happens inside written down.

    A case is `{"flags": [...]}` and perhaps `"count_waits_in": [steps]`; see `tests/gpu/watched_run.py`. It writes to
    `folder / name`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = {
        name: {**case, "flags": [*case["flags"], "--output_dir", str(folder / name)]} for name, case in cases.items()
    }
    (folder / "cases.json").write_text(json.dumps(todo))
    finished = run(launched(WATCHED_RUN, str(folder / "cases.json"), ranks=ranks), timeout, **variables)
    (folder / "log.txt").write_text(finished.output)
    return finished


def seen(folder: Path, name: str) -> list[dict[str, Any]]:
    """What was written down inside a case of `run_watched`, by rank."""
    return [read_json(path) for path in sorted(folder.glob(f"{name}.seen-*.json"))]


def start_ranks(words: list[str], log: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    """The ranks of a run as Slurm would start them, so that each can be stopped or killed by itself."""
    step = {"SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_STEP_TASKS_PER_NODE": str(ranks), "SLURM_JOB_ID": "77"}
    step |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(free_port())}
    with log.open("ab") as file:
        return [
            subprocess.Popen(
                [sys.executable, str(TRAIN), *words],
                env=environment(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]


def end_ranks(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Kill those that still run; a stopped process takes nothing but a kill."""
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    for rank in ranks:
        rank.wait(timeout=600)


def rehearse(words: list[str]) -> int:
    """Run pytest with stand-in devices in place of a card; gives its exit code."""
    from tests.support import cuda_standin

    devices = int(os.environ.get(cuda_standin.VARIABLE, "0")) or 1
    # Without a card bitsandbytes computes by compiled Python, anew for each shape: minutes for a test.
    env = cuda_standin.environment(devices, TORCHDYNAMO_DISABLE="1")
    return subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", *words], env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(rehearse(sys.argv[1:]))

"""The commands of the files for Kubernetes and SkyPilot, run here: stopped as Kubernetes does, and started again.

Each node's command and variables are taken from the files. Only what can't be had here is replaced: the address of the
first node, the number of GPUs, the volume, model and data.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rm_scale.files import free_port
from rm_scale.training.attempts import read_attempts
from tests.support.cloud_files import NodeCommand, jobset_node, skypilot_node, trainjob_node
from tests.support.launching import REPOSITORY, environment, losses, weights

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

NODES = 2
STEPS = 5
STOP_AT = 3

# Loaded by Python at the start of each rank, before train.py. The signal goes to the node's main process, as the
# kubelet's does, at a step that doesn't depend on the machine's speed.
EVICTION = f"""
import os, signal, time
from rm_scale.training import preemption
steps, look = -1, preemption.reason_now  # it is asked once before the first step
def evicted(*words):
    global steps
    steps += 1
    if steps == {STOP_AT} and os.environ.get("RANK") == "1":
        os.kill(os.getppid(), signal.SIGTERM)
        while not preemption.received_signal():
            time.sleep(0.01)
    return look(*words)
preemption.reason_now = evicted
"""


@pytest.fixture(scope="module")
def settings(tiny_model: Path, pairs_file: Path) -> list[str]:
    words = ["--model_name_or_path", str(tiny_model), "--dataset_name", "none", "--dataset_test_split", "none"]
    words += ["--dataset_path", str(pairs_file), "--eval_split_size", "8", "--eval_strategy", "no", "--bf16", "false"]
    words += ["--global_batch_size", "8", "--per_device_train_batch_size", "4", "--max_steps", str(STEPS)]
    words += ["--learning_rate", "3e-3", "--logging_steps", "1", "--report_to", "none", "--deepspeed", "zero2"]
    return [*words, "--sample_scores", "0", "--disable_tqdm"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[tuple[int, str]]]]:
    """Run both nodes of a file to their end; gives exit code and output of each."""
    running: list[subprocess.Popen[str]] = []

    def run(nodes: list[NodeCommand], settings: list[str], output: Path, **extra: str) -> list[tuple[int, str]]:
        port = str(free_port())
        started = []
        for place, node in enumerate(nodes):
            words, variables = at_home(node, output, port, settings)
            log = (tmp_path / f"node{place}.log").open("w")
            started.append(
                subprocess.Popen(
                    words,
                    env=environment(**variables, **extra),
                    cwd=REPOSITORY,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
            log.close()
        running.extend(started)
        codes = [process.wait(timeout=900) for process in started]
        return [(code, (tmp_path / f"node{place}.log").read_text()) for place, code in enumerate(codes)]

    yield run
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def at_home(node: NodeCommand, output: Path, port: str, settings: list[str]) -> tuple[list[str], dict[str, str]]:
    """A node's command and variables with one rank, on this machine, of a tiny run."""

    def here(text: str) -> str:
        return text.replace("/data/outputs/rm-13b", str(output))

    replaced = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "PET_NPROC_PER_NODE": "1"}
    words = [here(word) for word in node.words]
    variables = {name: replaced.get(name, here(value)) for name, value in node.variables.items() if name != "HF_HOME"}
    if words[0] == "bash":  # SkyPilot's: the settings end its script
        variables["SKYPILOT_NUM_GPUS_PER_NODE"] = "1"
        script = words[2].rstrip().replace("PET_MASTER_PORT=29500", f"PET_MASTER_PORT={port}")
        words = [*words[:2], f'{script} "$@"', "bash"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return [*words, *settings], {**variables, "PATH": path}


@pytest.mark.timeout(2700)
def test_a_run_that_kubernetes_stops_goes_on_where_it_was(
    settings: list[str],
    start: Callable[..., list[tuple[int, str]]],
    tmp_path: Path,
) -> None:
    """SkyPilot's to the end; JobSet's evicted, with exit code 85; Trainer's goes on after it: the same bits at the end.

    Between the two, the lock is left as a killed pod on another machine would leave it.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for code, text in start([skypilot_node(place) for place in range(NODES)], settings, whole):
        assert code == 0, text[-4000:]

    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(EVICTION)
    for code, text in start([jobset_node(place) for place in range(NODES)], settings, stopped, PYTHONPATH=str(hook)):
        assert code == 85, text[-4000:]
    assert (stopped / f"checkpoint-{STOP_AT}" / "manifest.json").exists()
    assert len(losses(stopped)) == STOP_AT

    leave_lock(stopped)
    for code, text in start([trainjob_node(place) for place in range(NODES)], settings, stopped):
        assert code == 0, text[-4000:]
    assert losses(stopped) == losses(whole)
    first, second = weights(stopped), weights(whole)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    events = [(e["attempt"], e["event"], e["step"]) for e in read_attempts(stopped / "run") if e["event"] != "saved"]
    assert events[:5] == [(1, "start", 0), (1, "first_step", 1), (1, "signal", 3), (1, "end", 3), (2, "start", 3)]
    assert not (stopped / ".rm_scale_lock").exists()


def leave_lock(output: Path) -> None:
    """A lock whose owner can't be seen from here."""
    owner = {"host": "rm-13b-node-0-0", "pid": 17, "started": 1, "boot": "another", "machine": "", "namespace": "x"}
    owner |= {"job": None, "attempt": 0, "cluster": "", "since": ""}
    (output / ".rm_scale_lock").write_text(json.dumps(owner) + "\n")


def test_wrong_settings_end_a_node_with_2(start: Callable[..., list[tuple[int, str]]], tmp_path: Path) -> None:
    output = tmp_path / "run"
    ((code, text),) = start([jobset_node(0)], ["--learning_rate", "-1"], output)
    assert code == 2 and "learning_rate='-1'" in text, text[-4000:]


# --- examples/ranks.sh itself, with programs in the place of training -------------------------------------------------


class Place:
    """A copy of the script beside a `rm_scale/train.py` that does what a test needs."""

    def __init__(self, folder: Path, program: str) -> None:
        self.folder = folder
        for name in ("examples", "rm_scale"):
            (folder / name).mkdir()
        shutil.copy(REPOSITORY / "examples" / "ranks.sh", folder / "examples")
        (folder / "rm_scale" / "train.py").write_text("import os, signal, sys, time, pathlib\n" + program)

    def start(self, ranks: int = 3, **extra: str) -> subprocess.Popen[str]:
        variables = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": str(ranks)}
        variables |= {"PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "29500", "RM_SCALE_KILL_SECONDS": "0"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [str(self.folder / "examples" / "ranks.sh"), "--x", "two words"],
            env={**os.environ, **variables, "PATH": path, **extra},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, ranks: int = 3, **extra: str) -> tuple[int, str]:
        process = self.start(ranks, **extra)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output


def test_ranks_get_their_place_and_settings(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT"
    line = f"' '.join([*map(os.environ.get, '{names}'.split()), str(sys.argv[1:])])"
    place = Place(tmp_path, f"os.write(1, ({line} + chr(10)).encode())\n")  # in one piece, beside the other rank's
    code, output = place.end(2)
    assert code == 0
    assert sorted(output.splitlines()) == [
        "2 0 4 2 1 first 29500 ['--x', 'two words']",
        "3 1 4 2 1 first 29500 ['--x', 'two words']",
    ]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("", 0),
        ("sys.exit(85)", 85),
        ("sys.exit(85 if os.environ['LOCAL_RANK'] == '1' else 0)", 85),
        ("sys.exit(2)", 2),
        ("os.kill(os.getpid(), 9) if os.environ['LOCAL_RANK'] == '2' else sys.exit(85)", 137),
        # The others wait for the one that failed, for ever.
        ("sys.exit(1) if os.environ['LOCAL_RANK'] == '0' else time.sleep(10_000)", 1),
    ],
)
def test_a_node_ends_with_the_code_of_its_ranks(tmp_path: Path, program: str, expected: int) -> None:
    code, output = Place(tmp_path, program).end()
    assert code == expected, output


def test_a_request_to_stop_reaches_ranks_that_start_slowly(tmp_path: Path) -> None:
    """A SIGTERM before training listens: the ranks don't die of it, and are asked again when they can hear."""
    program = """
place = pathlib.Path(f"alive{os.environ['RANK']}")
place.touch()
while not pathlib.Path("sent").exists():
    time.sleep(0.05)
signal.signal(signal.SIGUSR1, lambda *_: os._exit(85))
time.sleep(10_000)
"""
    process = Place(tmp_path, program).start(2)
    while not all((tmp_path / f"alive{rank}").exists() for rank in (2, 3)):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    (tmp_path / "sent").touch()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 85, output


@pytest.mark.parametrize(("job", "removed"), [("mine", True), ("other", False)])
def test_only_a_lock_of_the_same_job_is_taken_over(tmp_path: Path, job: str, removed: bool) -> None:
    place = Place(tmp_path, "")
    output = tmp_path / "data" / "run"
    place.end(1, PET_NODE_RANK="0", OUTPUT_DIR=str(output), RM_SCALE_JOB="mine")
    output.mkdir()
    leave_lock(output)
    code, _ = place.end(1, PET_NODE_RANK="1", OUTPUT_DIR=str(output), RM_SCALE_JOB=job)
    assert code == 0 and (output / ".rm_scale_lock").exists(), "only the first node looks after the lock"
    for _ in range(2):
        place.end(1, PET_NODE_RANK="0", OUTPUT_DIR=str(output), RM_SCALE_JOB=job)
        assert (output / ".rm_scale_lock").exists() is not removed


@pytest.mark.parametrize("name", ["PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR"])
def test_a_missing_variable_is_said(tmp_path: Path, name: str) -> None:
    code, output = Place(tmp_path, "").end(1, **{name: "auto" if name == "PET_NPROC_PER_NODE" else ""})
    assert code == 2 and name in output and "Fix:" in output

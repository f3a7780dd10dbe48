"""One node as real processes: exit codes, signals, logs, a failed rank, an attempt that was replaced."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_scale.files import write_whole
from rm_scale.slurm.job_start import Start, fence_path, read_fence, read_start
from rm_scale.slurm.node import describe, exit_code, rank_environment
from rm_scale.slurm.requeue import judge as judge_end

SCRIPT = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
what = dict(word.split("=") for word in sys.argv[1:])
print("hello from", rank, "of", os.environ["WORLD_SIZE"], flush=True)
if what.get("slow_start"):
    time.sleep(float(what["slow_start"]))
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
if str(rank) == what.get("fails"):
    print("RuntimeError: something broke", flush=True)
    os.kill(os.getpid(), int(what["signal"])) if "signal" in what else sys.exit(int(what["code"]))
end = time.monotonic() + float(what.get("seconds", "0"))
while time.monotonic() < end and not stopped:
    time.sleep(0.02)
sys.exit(85 if stopped else 0)
"""


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Two ranks on the only node of a job."""
    train = tmp_path / "train.py"
    train.write_text(SCRIPT)
    folder = tmp_path / "logs" / "7" / "attempt-0"
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words: dict[str, Any] = {"job_id": 7, "attempt": 0, "nodes": ("a",), "ranks_per_node": 2, "gpus_per_node": 0}
    words |= {"master_addr": "127.0.0.1", "master_port": port, "train": str(train), "settings": (), "asked": ()}
    return Start(**words, output_dir=str(tmp_path / "out"), folder=str(folder))


def begin(start: Start, *settings: str, kill_seconds: float = 30, shell: str = "") -> subprocess.Popen[str]:
    """The node's task, as srun starts it."""
    path = replace(start, settings=settings).write()
    command = [sys.executable, "-m", "rm_scale.slurm.node", str(path)]
    if shell:
        command = ["bash", "-c", shell, "task", *command]
    env = {**os.environ, "SLURMD_NODENAME": "a", "RM_SCALE_KILL_SECONDS": str(kill_seconds)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(start: Start, node: str = "a") -> dict[str, Any]:
    """What the node wrote down."""
    return dict(json.loads((Path(start.folder) / f"{node}.end.json").read_text()))


def test_ranks_finish_and_keep_logs(start: Start) -> None:
    task = begin(start)
    out, _ = task.communicate(timeout=600)
    assert task.returncode == 0 and out == "hello from 0 of 2\n", "rank 0 speaks for the job"
    assert (Path(start.folder) / "a.rank1.log").read_text() == "hello from 1 of 2\n"
    assert (Path(start.folder) / "a.rank0.log").read_text() == "hello from 0 of 2\n"
    assert end_of(start)["codes"] == {"0": 0, "1": 0}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_ranks_that_were_not_ready_for_it(start: Start, number: signal.Signals) -> None:
    """It comes while they still import; they live, and hear it again. The shell before them ignores it, as in a job."""
    task = begin(start, "slow_start=1.5", "seconds=60", shell='trap "" USR1; exec "$@"')
    log = Path(start.folder) / "a.rank1.log"
    _until(lambda: log.exists() and "hello" in log.read_text())
    task.send_signal(number)
    task.communicate(timeout=600)
    assert task.returncode == 0, "another code would make srun kill other nodes' tasks"
    assert end_of(start)["code"] == 85 and end_of(start)["asked"] == number.name
    assert judge_end(start, {"a": end_of(start)}, 0) == (85, "")


def test_a_failed_rank_is_named_and_the_others_are_ended(start: Start) -> None:
    task = begin(start, "fails=1", "code=4", "seconds=60", kill_seconds=0.5)
    _, err = task.communicate(timeout=600)
    assert task.returncode == 4
    assert "rm_scale a: rank 1 ended with code 4" in err and "rank 1| RuntimeError: something broke" in err
    assert end_of(start)["codes"] == {"0": 137, "1": 4} and end_of(start)["reason"].startswith("rank 1 ")


def test_a_killed_rank_is_told_as_a_shell_would(start: Start) -> None:
    task = begin(start, "fails=0", "signal=9")
    _, err = task.communicate(timeout=600)
    assert task.returncode == 137 and "rank 0 was killed (signal 9) by somebody, or by something that" in err


def test_ranks_end_when_a_later_attempt_has_begun(start: Start) -> None:
    """The disk is still there, the network to Slurm is not."""
    task = begin(start, "seconds=60")
    log = Path(start.folder) / "a.rank1.log"
    _until(log.exists)
    write_whole(fence_path(Path(start.folder).parent), "1")
    _, err = task.communicate(timeout=600)
    assert task.returncode == 3 and "attempt 1 has begun elsewhere" in err
    assert end_of(start)["codes"] == {"0": 137, "1": 137}


def test_ranks_do_not_outlive_their_task(start: Start) -> None:
    task = begin(start, "seconds=60")
    log = Path(start.folder) / "a.rank1.log"
    _until(lambda: log.exists() and "hello" in log.read_text())
    children = [int(pid) for pid in Path(f"/proc/{task.pid}/task/{task.pid}/children").read_text().split()]
    assert len(children) == 2
    task.kill()
    task.communicate(timeout=600)
    _until(lambda: not any(_runs(pid) for pid in children))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _until(done: Any) -> None:
    end = time.monotonic() + 600
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_places_and_words(start: Start) -> None:
    two = replace(start, nodes=("a", "b"))
    place = rank_environment(two, 1, 1, {"KEPT": "x"})
    told = {name: place[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "KEPT")}
    assert told == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "KEPT": "x"}
    assert [exit_code(code) for code in (0, 85, -9)] == [0, 85, 137]
    assert describe(143) == "was ended by signal 15" and describe(7) == "ended with code 7"
    assert read_start(two.write()) == two
    assert read_fence(Path("/nowhere")) is None

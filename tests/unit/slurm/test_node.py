"""One node as real processes: exit codes, signals, logs, a failed rank, an attempt that was replaced."""

from __future__ import annotations

import json
import os
import shutil
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
from rm_scale.slurm.job_start import Start, end_path, fence_path, read_fence, read_start
from rm_scale.slurm.node import Node, Rank, describe, exit_code, rank_environment
from rm_scale.slurm.rank_logs import RankOutput
from rm_scale.slurm.requeue import judge as judge_end
from tests.support.memory_group import memory_group
from tests.support.small_disks import small_disk

SCRIPT = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
what = dict(word.split("=") for word in sys.argv[1:])
print("hello from", rank, "of", os.environ["WORLD_SIZE"], flush=True)
print("x" * int(what.get("bytes", "0")), end="", flush=True)
if what.get("slow_start"):
    time.sleep(float(what["slow_start"]))
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
if str(rank) == what.get("fails"):
    print("RuntimeError:", what.get("says", "something_broke").replace("_", " "), *["\\nmore"] * 20, flush=True)
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


def begin(
    start: Start, *settings: str, kill_seconds: float = 30, shell: str = "", stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """The node's task, as srun starts it."""
    path = replace(start, settings=settings).write()
    command = [sys.executable, "-m", "rm_scale.slurm.node", str(path)]
    if shell:
        command = ["bash", "-c", shell, "task", *command]
    env = {**os.environ, "SLURMD_NODENAME": "a", "RM_SCALE_KILL_SECONDS": str(kill_seconds)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)


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
    assert "rm_scale a: rank 1 ended with code 4" in err and "rank 1| more" in err
    assert end_of(start)["codes"] == {"0": 137, "1": 4} and end_of(start)["reason"].startswith("rank 1 ")
    assert end_of(start)["blames_device"] is False


@pytest.mark.parametrize(
    ("says", "blames_device"),
    [
        ("CUDA_error:_uncorrectable_ECC_error_encountered", True),
        ("CUDA_error:_device-side_assert_triggered", False),  # by the program
        ("CUDA_out_of_memory._Tried_to_allocate_2_GiB", False),
    ],
)
def test_a_device_that_failed_is_told_from_a_program(start: Start, says: str, blames_device: bool) -> None:
    task = begin(start, "fails=1", "code=1", f"says={says}", kill_seconds=0.5)
    task.communicate(timeout=600)
    assert end_of(start)["blames_device"] is blames_device


def test_a_killed_rank_is_told_as_a_shell_would(start: Start) -> None:
    task = begin(start, "fails=0", "signal=9")
    _, err = task.communicate(timeout=600)
    assert task.returncode == 137 and "rank 0 was killed (signal 9) by somebody, or by something that" in err


def ended_ranks(start: Start, *codes: int) -> Node:
    """A node whose ranks have all ended before it looks."""
    node = Node(start, 0)
    for number, code in enumerate(codes):
        text = f"(( {code} < 128 )) || kill -9 $$; exit {code}"
        process = subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE)
        process.wait(600)
        assert process.stdout is not None
        output = RankOutput(process.stdout.fileno(), [])
        output.begin()
        node.ranks.append(Rank(number, process, Path(start.folder) / "log", output))
    return node


def test_a_rank_that_was_ended_counts_before_those_that_missed_it(start: Start) -> None:
    """The others blame the connection."""
    node = ended_ranks(start, 1, 137)
    node._end_survivors()
    assert node.reason.startswith("rank 1 was killed (signal 9) by ")


def test_ranks_that_all_end_between_two_looks(start: Start) -> None:
    """The task itself failed then, without a record of how they ended."""
    node = ended_ranks(start, 0, 4)
    node._wait()
    assert node._judge() == 4 and node.reason == "rank 1 ended with code 4"


def test_the_kernels_own_killer_is_named(start: Start) -> None:
    """A rank that needs more than its job may have. Only processes of that control group can be hit."""
    grows = "blocks = []\nwhile rank == 1:\n    blocks.append(os.urandom(1 << 20))\n"
    Path(start.train).write_text(SCRIPT.replace("stopped = []", grows + "stopped = []"))
    with memory_group() as group:
        group.limit(300 << 20)
        task = begin(start, "seconds=60", kill_seconds=0.2, shell=f'{group.enter}; exec "$@"')
        _, err = task.communicate(timeout=600)
    assert task.returncode == 137 and "rank 1 was killed (signal 9) by the kernel's out-of-memory killer (" in err, err
    assert " GB " in err and "ask for more of it (--mem)" in err
    assert end_of(start)["codes"] == {"0": 137, "1": 137}


def test_a_job_log_that_refuses_hides_no_end(start: Start) -> None:
    """A message that could not be written ended the node's task without a record: the node counted as lost."""
    full = os.open("/dev/full", os.O_WRONLY)
    task = begin(start, "fails=1", "code=4", "seconds=60", kill_seconds=0.2, stderr=full)
    os.close(full)
    task.communicate(timeout=600)
    assert task.returncode == 4 and end_of(start)["codes"] == {"0": 137, "1": 4}


def test_a_job_log_that_hangs_holds_nobody_up(start: Start) -> None:
    """Nobody reads what the task says, as where srun waits for a network disk."""
    task = begin(start, "fails=1", "code=4", "seconds=60", "bytes=300000", kill_seconds=0.2, stderr=subprocess.STDOUT)
    assert task.wait(600) == 4 and end_of(start)["codes"] == {"0": 137, "1": 4}
    assert (Path(start.folder) / "a.rank1.log").stat().st_size > 300_000
    assert task.stdout is not None
    task.stdout.close()


def test_a_folder_of_logs_that_was_removed_ends_no_rank(start: Start) -> None:
    task = begin(start, "seconds=60")
    _until(lambda: (Path(start.folder) / "a.rank1.log").exists())
    shutil.rmtree(start.folder)
    task.send_signal(signal.SIGUSR1)
    out, _ = task.communicate(timeout=600)
    assert task.returncode == 0 and out == "hello from 0 of 2\n"


def test_the_record_of_the_end_has_its_room_from_the_start(start: Start) -> None:
    """A full disk must not turn a node that has saved into one that was lost."""
    with small_disk(Path(start.folder) / "small", "64k") as disk:
        start = replace(start, folder=str(disk.path))
        task = begin(start, "seconds=60")
        log = disk.path / "a.rank1.log"
        _until(lambda: log.exists() and "hello" in log.read_text())
        disk.fill(log)
        task.send_signal(signal.SIGUSR1)
        task.communicate(timeout=600)
        assert task.returncode == 0 and end_of(start)["code"] == 85


def test_a_record_of_an_earlier_try_is_not_taken_for_this_one(start: Start) -> None:
    end_path(Path(start.folder), "a").write_text('{"node": "a", "code": 1, "time": 1}')
    task = begin(start, "seconds=60")
    log = Path(start.folder) / "a.rank1.log"
    _until(log.exists)
    assert not end_path(Path(start.folder), "a").exists()
    task.kill()
    task.communicate(timeout=600)


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

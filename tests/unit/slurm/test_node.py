"""One node as real processes: exit codes, signals, logs, a failed rank, an attempt that was replaced; and the check."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_scale.files import write_whole
from rm_scale.slurm.job_start import Start, fence_path, read_fence, read_start
from rm_scale.slurm.node import describe, exit_code, rank_environment
from rm_scale.slurm.node_check import _missing, check_node, judge, look_around, mark_folders, token_path
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
    assert task.returncode == 137 and "rank 0 was killed (signal 9: most often" in err


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


# --- The check before ------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(start: Start, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Two nodes, played by two threads."""
    monkeypatch.setenv("RM_SCALE_CHECK_SECONDS", "3")
    two = replace(start, nodes=("a", "b"))
    mark_folders(two)
    return two


def test_nodes_meet_and_leave_nothing(pair: Start, capsys: pytest.CaptureFixture[str]) -> None:
    other = threading.Thread(target=check_node, args=(pair, 1))
    other.start()
    assert check_node(pair, 0) == 0
    other.join(600)
    assert not token_path(Path(pair.output_dir), pair).exists()
    assert capsys.readouterr().err == ""


def test_a_node_that_does_not_come_is_named(pair: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_node(pair, 0) == 2
    assert "b: did not answer within 3 s and left no sign" in capsys.readouterr().err


def test_a_port_that_was_taken_meanwhile(pair: Start, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", pair.master_port))
        taken.listen()
        assert check_node(pair, 0) == 2
    assert f"port {pair.master_port} on a: Address already in use. Fix: submit again" in capsys.readouterr().err


def test_a_node_that_runs_but_can_not_connect_says_so(pair: Start) -> None:
    assert check_node(pair, 1) == 0, "the first node speaks"
    assert "b: runs, but can't reach 127.0.0.1 on port" in _missing(pair, "b")


def test_strangers_at_the_port_are_passed_over(pair: Start) -> None:
    def stranger() -> None:
        for _ in range(100):
            try:
                with socket.create_connection((pair.master_addr, pair.master_port), timeout=1) as link:
                    link.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return
            except OSError:
                time.sleep(0.02)

    threads = [threading.Thread(target=stranger), threading.Thread(target=check_node, args=(pair, 1))]
    for thread in threads:
        thread.start()
    assert check_node(pair, 0) == 0
    for thread in threads:
        thread.join(600)


def test_what_nodes_see_is_judged(pair: Start) -> None:
    first = look_around(pair, 0)
    assert judge(pair, {"a": first, "b": {**first, "node": "b"}}) == []
    token_path(Path(pair.output_dir), pair).write_text("another job's")
    blind = look_around(pair, 1)
    (told,) = judge(pair, {"a": first, "b": blind})
    assert "output_dir=" in told and "b sees another content there than a wrote" in told
    token_path(Path(pair.output_dir), pair).unlink()
    assert "b can't see what a wrote there" in judge(pair, {"a": first, "b": look_around(pair, 1)})[0]
    (told,) = judge(replace(pair, gpus_per_node=8), {"a": {**first, "gpus": 8}, "b": {**first, "gpus": 4}})
    assert told == "GPUs per node: a has 8, b has 4. Fix: ask for --gpus-per-node=N rather than --gpus=N."
    (told,) = judge(pair, {"a": first, "b": {**first, "train": False}})
    assert "not on b. Fix: install rm_scale on the shared disk" in told

"""The doctor and the bench across real ranks: under DeepSpeed's launcher, with a hostfile, and as a Slurm step."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rm_scale.cli import main as rm_scale
from rm_scale.files import free_port
from rm_scale.planning.hardware import read_devices
from tests.support.launching import environment, run

pytestmark = pytest.mark.distributed

_PROGRAM = (
    "import argparse, sys\n"
    "from rm_scale.commands import doctor\n"
    "parser = argparse.ArgumentParser()\n"
    "doctor.add_arguments(parser)\n"
    "sys.exit(doctor.run(parser.parse_args()))\n"
)
DOCTOR = [sys.executable, "-c", _PROGRAM, "--json"]


def checks_of(output: str) -> dict[str, dict[str, Any]]:
    """The checks of the JSON report among other output, by name; of several the last."""
    content, _ = json.JSONDecoder().raw_decode(output[output.index("{\n") :])
    return {check["name"]: check for check in content["checks"]}


def test_two_ranks_under_the_launcher(tmp_path: Path, tiny_model: Path) -> None:
    words = ["--nproc", "2", "--output_dir", str(tmp_path), "--model", str(tiny_model)]
    done = subprocess.run(
        [*DOCTOR, *words], env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    content = json.loads(done.stdout)
    assert (done.returncode, content["ok"]) == (0, True), done.stdout + done.stderr
    assert content["world"] == {"size": 2, "launcher": "deepspeed", "hostfile": None}
    checks = {check["name"]: check for check in content["checks"]}
    for name in ("ranks", "same versions", "output directory", "clocks", "collectives", "model forward", "imports"):
        assert checks[name]["status"] == "pass", checks[name]
    assert checks["ranks"]["seen"].startswith("2 ranks on 1 node met after")
    assert "results right on 2 ranks; all-reduce of 8 MiB over gloo" in checks["collectives"]["seen"]
    wheres = {finding["where"] for finding in content["findings"] if finding["name"] == "model forward"}
    assert wheres == {f"rank {rank} on {socket.gethostname()}" for rank in range(2)}
    assert list(tmp_path.iterdir()) == []


# Stand-ins that run the words here: ssh [options] HOST WORDS, and pdsh ... -w HOSTS WORDS with %n for the number.
_SSH = 'while [ "${1#-}" != "$1" ]; do case "$1" in -o|-p) shift;; esac; shift; done; shift; exec sh -c "$*"'
_PDSH = """while [ "$1" != -w ]; do shift; done
hosts=$2; shift 2; number=0
for host in $(echo "$hosts" | tr , ' '); do
  (sh -c "$(echo "$*" | sed "s/%n/$number/g")" 2>&1; echo $? >"$CODES/$host") | sed -u "s/^/$host: /" &
  number=$((number + 1))
done
wait
exit "$(cat "$CODES"/* | sort -n | tail -1)"
"""


@pytest.mark.long
def test_machines_of_a_hostfile(tmp_path: Path) -> None:
    """Two machines, played by this one; real are DeepSpeed's launcher, the ranks, and what they say."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (("ssh", _SSH), ("pdsh", _PDSH)):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "codes").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    env = environment(PATH=f"{tools}:{os.environ['PATH']}", CODES=str(tmp_path / "codes"))
    done = run([*DOCTOR, "--hostfile", str(tmp_path / "hosts"), "--output_dir", str(tmp_path / "out")], env=env)
    checks = checks_of(done.output)
    assert checks["hosts"]["seen"] == "ssh reaches all 2"
    assert checks["ranks"]["seen"].startswith("2 ranks on 1 node met"), done.output[-3000:]
    assert checks["output directory"]["seen"].endswith("all 2 nodes see what the others write")
    assert checks["collectives"]["status"] == checks["python"]["status"] == "pass"


def start_step(rank: int, port: int, words: list[str], before: str = "", timeout: str = "60") -> subprocess.Popen[str]:
    """One task of a Slurm step of two nodes; `before` runs as a shell command in namespaces of its own."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_ID": "77"}
    step |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
    command = [*DOCTOR, "--timeout_seconds", timeout, *words]
    if before:
        command = [
            "unshare",
            "--user",
            "--map-root-user",
            "--uts",
            "--mount",
            "sh",
            "-c",
            f'{before} && exec "$@"',
            "-",
            *command,
        ]
    return subprocess.Popen(
        command,
        env=environment(**step, SLURM_PROCID=str(rank), MASTER_PORT=str(port)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def can_play_nodes() -> bool:
    """May this user have a host name and mounts of its own?"""
    if shutil.which("unshare") is None:
        return False
    words = [
        "unshare",
        "--user",
        "--map-root-user",
        "--uts",
        "--mount",
        "sh",
        "-c",
        "hostname node1 && mount -t tmpfs t /mnt",
    ]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.long
def test_two_nodes_whose_disk_is_not_shared(tmp_path: Path) -> None:
    """Each node has its own name and its own disk at the same place."""
    if not can_play_nodes():
        pytest.skip("this machine lets nobody unshare host name and mounts")
    port, words = free_port(), ["--output_dir", str(tmp_path)]
    tasks = [
        start_step(rank, port, words, f"hostname node{rank} && mount -t tmpfs none {tmp_path}") for rank in range(2)
    ]
    outputs = [task.communicate(timeout=600)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [1, 1], outputs
    checks = checks_of(outputs[0])
    assert (
        checks["ranks"]["seen"].startswith("2 ranks on 2 nodes met after")
        and "(started by srun)" in checks["ranks"]["seen"]
    )
    disk = checks["output directory"]
    assert disk["status"] == "fail" and "node1 can't see what rank 0 wrote" in disk["seen"], disk
    assert checks["clocks"]["seen"].startswith("node1 is ")
    assert checks["collectives"]["status"] == "pass"
    assert "{\n" not in outputs[1], "one rank prints for all"


@pytest.mark.long
def test_ranks_that_miss_each_other(tmp_path: Path) -> None:
    """Each of the two waits at a port of its own: both must end, and say what they waited for."""
    words = ["--output_dir", str(tmp_path)]
    started = time.monotonic()
    tasks = [start_step(rank, free_port(), words, timeout="4") for rank in range(2)]
    outputs = [task.communicate(timeout=600)[0] for task in tasks]
    assert time.monotonic() - started < 150
    assert [task.returncode for task in tasks] == [1, 1]
    lost = checks_of(outputs[0])["ranks"]
    assert lost["status"] == "fail" and "1/2 clients joined" in lost["seen"]
    assert "rank 1:\n" in outputs[1] and "fail  ranks" in outputs[1] and "{\n" not in outputs[1]


@pytest.mark.long
def test_bench_of_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.yaml"
    words = ["--nproc", "2", "--seconds", "2", "--output", str(path), "--name", "here"]
    assert rm_scale(["bench", "hardware", *words]) == 0
    (device,) = read_devices(str(path)).values()
    assert device.is_cpu and device.name == "cpu-here" and device.devices_per_node == 2
    assert device.peak_flops == device.matmul_flops > 1e9
    assert device.memory_bandwidth > 1e8 and device.link_bandwidth > 1e6 and device.memory_bytes > 1e8
    table = capsys.readouterr().out
    for part in ("matrix products", "typical", "triad", "reduce_scatter", "fits", "--gpu cpu-here --hardware"):
        assert part in table

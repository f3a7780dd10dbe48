"""How nodes and ranks find each other: a port that is taken under way, names that lead nowhere, IPv6 alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rm_scale.slurm.job_start import read_start
from tests.support.cluster import Cluster, Job, template, until
from tests.support.launching import read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

NODES = ("node1", "node2")
PAIR = ("--nodes=2", f"--nodelist={','.join(NODES)}", template("1b"))

# Started by srun on the node before each task of the job (SLURM_TASK_PROLOG). Step 1 is the first training: it begins
# only when the port has been taken.
PROLOG = """#!/bin/bash
[[ $SLURM_STEP_ID == 1 ]] || exit 0
touch "{folder}/waiting"
until [[ -e "{folder}/taken" ]]; do sleep 0.1; done
"""

# A program that has nothing to do with the job. It answers nobody, and stays until it is told to end.
STRANGER = """
import os, socket, sys, time
server = socket.create_server(("", int(sys.argv[1])))
open(sys.argv[2], "w").close()
while not os.path.exists(sys.argv[3]):
    time.sleep(0.2)
"""


def start_of(job: Job) -> Path:
    """The record of the job's first attempt."""
    return job.logs / "attempt-0" / "start.json"


def test_a_port_that_is_taken_between_its_choice_and_its_use(own_cluster: Cluster, inputs: list[str]) -> None:
    """Rank 0 ends at once, and all ranks are started again at the next port, in the same attempt."""
    cluster, folder = own_cluster, own_cluster.work / "meeting"
    folder.mkdir()
    prolog, stranger = folder / "prolog.sh", folder / "stranger.py"
    prolog.write_text(PROLOG.format(folder=folder))
    prolog.chmod(0o755)
    stranger.write_text(STRANGER)
    words = ["--max_steps", "1", "--save_strategy", "no", "--output_dir", str(folder / "run")]
    env = {"SLURM_TASK_PROLOG": str(prolog), "RM_SCALE_RANKS_PER_NODE": "2", "RM_SCALE_KILL_SECONDS": "1"}
    job = cluster.submit("--nodes=1", "--nodelist=node1", template("1b"), *inputs, *words, env=env)
    until((folder / "waiting").exists, 900, job.output)
    port = read_start(start_of(job)).master_port
    # It goes on in the background, as a daemon of the node.
    begin = f'setsid python3 "{stranger}" {port} "{folder}/taken" "{folder}/end" </dev/null >/dev/null 2>&1 &'
    cluster.fault("in", "node1", "bash", "-c", begin)
    try:
        shown = cluster.wait(job)
    finally:
        (folder / "end").touch()
    log = job.output()
    assert shown["JobState"] == "COMPLETED", log[-3000:]
    assert f"MASTER_PORT={port}: rank 0 can't listen there on node1 (address already in use)" in log
    assert "another program has taken the port: trying another" in log and "Traceback" not in log
    assert read_start(start_of(job)).master_port > port
    events = [event["event"] for event in read_lines(job.logs / "events.jsonl")]
    assert "port_taken" in events and "requeue" not in events


@pytest.fixture
def hosts(own_cluster: Cluster) -> Iterator[dict[str, Path]]:
    """/etc/hosts of two nodes, to be written to: each has its own until the test ends."""
    files = {}
    own_cluster.wait_until_idle()
    for node in NODES:
        files[node] = own_cluster.work / f"{node}.hosts"
        files[node].write_text("127.0.0.1 localhost\n::1 localhost\n")
        own_cluster.fault("in", node, "mount", "--bind", str(files[node]), "/etc/hosts")
    yield files
    for node in NODES:
        own_cluster.fault("in", node, "umount", "/etc/hosts")


def _address(own_cluster: Cluster, node: str) -> str:
    shown = own_cluster.run("scontrol", "--oneliner", "show", "node", node).output
    return shown.partition("NodeAddr=")[2].split()[0]


def test_names_of_the_loopback_and_names_that_nobody_knows(
    own_cluster: Cluster, inputs: list[str], hosts: dict[str, Path]
) -> None:
    """Debian's `127.0.1.1 NAME` on one node; the other knows no name at all, and Slurm alone knows the addresses."""
    cluster, output = own_cluster, own_cluster.work / "debian"
    with hosts["node1"].open("a") as file:
        file.write(f"127.0.1.1 node1\n{_address(cluster, 'node2')} node2\n")
    words = ["--max_steps", "1", "--save_strategy", "no", "--output_dir", str(output)]
    job = cluster.submit(*PAIR, *inputs, *words)
    assert cluster.wait(job)["JobState"] == "COMPLETED", job.output()[-3000:]
    assert read_start(start_of(job)).master_addr == _address(cluster, "node1")
    environment = json.loads((output / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert environment["step"] == 1


def test_nodes_that_share_ipv6_alone(own_cluster: Cluster, inputs: list[str], hosts: dict[str, Path]) -> None:
    """Their names, and the interface that they share, have addresses of IPv6 only."""
    cluster, output = own_cluster, own_cluster.work / "six"
    for number, node in enumerate(NODES, 1):
        for other in (1, 2):
            with hosts[node].open("a") as file:
                file.write(f"fd00:67::{other} node{other}\n")
        for words in (
            "link add link eth0 name six0 type macvlan mode bridge",
            "link set six0 up",
            f"addr add fd00:67::{number}/64 dev six0 nodad",
        ):
            cluster.fault("in", node, "ip", *words.split())
    try:
        settings = ["--max_steps", "1", "--save_strategy", "no", "--output_dir", str(output)]
        job = cluster.submit(*PAIR, *inputs, *settings, env={"RM_SCALE_INTERFACE": "six0"})
        assert cluster.wait(job)["JobState"] == "COMPLETED", job.output()[-3000:]
    finally:
        for node in NODES:
            cluster.fault("in", node, "ip", "link", "del", "six0")
    assert read_start(start_of(job)).master_addr == "fd00:67::1"
    assert [line["step"] for line in read_lines(output / "run" / "metrics.jsonl") if "loss" in line] == [1]

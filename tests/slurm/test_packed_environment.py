"""A packed environment: two nodes with disks of their own unpack it once each, train from it, and use it again."""

from __future__ import annotations

import os
import site
from pathlib import Path

import pytest

from tests.support.cluster import CLI, Cluster, Job, template
from tests.support.packed import make_small_environment

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

NODES = ("node1", "node2")
# Run by every Python of the environment as it starts: who it is, where, and from what.
WHOAMI = """
import os, sys
with open(os.environ["TEST_WITNESS"], "a") as file:
    node, rank = os.environ.get("SLURMD_NODENAME"), os.environ.get("RANK")
    file.write(f"{node} {rank} {sys.prefix} {os.environ.get('TRITON_CACHE_DIR')}\\n")
"""


def test_nodes_train_from_their_own_copies(own_cluster: Cluster, inputs: list[str]) -> None:
    cluster, local = own_cluster, own_cluster.work / "local"
    local.mkdir()
    venv = make_small_environment(cluster.work / "venv")
    packages = next(venv.glob("lib/python3*/site-packages"))
    (packages / "witness.py").write_text(WHOAMI)
    (packages / "witness.pth").write_text("import witness\n")
    archive, witness = cluster.work / "env.tar", cluster.work / "witness"
    packed = cluster.run(*CLI, "slurm", "pack", "--venv", str(venv), "--output", str(archive))
    assert packed.code == 0, packed.output
    for node in NODES:
        cluster.fault("hide", node, str(local))
    # The libraries themselves stay where they are: packing them takes minutes.
    env = {"RM_SCALE_PACKED_ENV": str(archive), "RM_SCALE_SCRATCH": str(local), "TEST_WITNESS": str(witness)}
    env["PYTHONPATH"] = os.pathsep.join(site.getsitepackages())

    def train(name: str) -> Job:
        words = [*inputs, "--max_steps", "1", "--save_strategy", "no", "--output_dir", str(cluster.work / name)]
        job = cluster.submit("--nodes=2", f"--nodelist={','.join(NODES)}", template("1b"), *words, env=env)
        assert cluster.wait(job)["JobState"] == "COMPLETED", job.output()[-3000:]
        return job

    first = train("first")
    for node in NODES:
        assert first.output().count(f"rm_scale {node}: unpacked {archive} to {local}/rm_scale-") == 1, first.output()
    assert "holds another rm_scale" not in first.output()
    started = [line.split() for line in witness.read_text().splitlines()]
    ranks = {(node, rank) for node, rank, *_ in started if rank != "None"}
    assert ranks == {("node1", "0"), ("node2", "1")}
    # Prepare, check, the nodes' tasks, the ranks and what decides at the end.
    assert {prefix.rpartition("-")[0] for _, _, prefix, _ in started} == {f"{local}/rm_scale-{os.getuid()}/env"}
    caches = {cache for _, rank, _, cache in started if rank != "None"}
    assert caches == {f"{local}/rm_scale-{os.getuid()}/caches/triton"}
    assert not list(local.iterdir())  # the disks of the nodes, not this one
    second = train("second")
    assert "unpacked" not in second.output()


def test_a_node_whose_disk_is_full_is_named(own_cluster: Cluster, inputs: list[str]) -> None:
    cluster, archive = own_cluster, own_cluster.work / "huge.tar"
    mark = Path(cluster.work, "rm_scale_packed.txt")
    mark.write_text(f"key={'0' * 16}\nfiles=1\nbytes={10**15}\nsources=\n")
    assert cluster.run("tar", "-cf", str(archive), mark.name).code == 0
    env = {"RM_SCALE_PACKED_ENV": str(archive)}
    words = [*inputs, "--max_steps", "1", "--output_dir", str(cluster.work / "not_unpacked")]
    job = cluster.submit("--nodes=1", template("1b"), *words, env=env)
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "2:0"), job.output()
    assert "MB free, and the packed environment needs 1000000000 MB. Fix:" in job.output()

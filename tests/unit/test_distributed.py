"""Ranks from every launcher's environment, and failures that all ranks agree on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from rm_scale.distributed import (
    World,
    detect_world,
    export_world,
    gather_from_ranks,
    host_group,
    init_process_group,
    prepare_environment,
    raise_together,
    sum_over_ranks,
)
from rm_scale.errors import DataError, UserError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, World()),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
            World(3, 4, 1, "deepspeed", 2),
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},
            World(0, 2, 0, "torchrun", 2),
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_PROCID": "5",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
            },
            World(5, 6, 1, "srun", 2),
        ),
        # A batch script's own shell is no job step: plain python there is one process.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, World()),
    ],
)
def test_world_comes_from_the_launcher(environ: dict[str, str], expected: World) -> None:
    assert detect_world(environ) == expected


def test_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(UserError, match="RANK=2 with WORLD_SIZE=2"):
        detect_world({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="RANK='x': must be a whole number"):
        detect_world({"RANK": "x", "WORLD_SIZE": "2"})


def test_srun_rendezvous_is_the_same_on_all_nodes() -> None:
    step = {"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "node7"}
    with mock.patch.dict(os.environ, step, clear=True):
        export_world(World(1, 2, 0, "srun", 1))
        assert os.environ["MASTER_ADDR"] == "node7"
        assert os.environ["MASTER_PORT"] == str(20_000 + 123458 % 40_000)
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("MASTER_PORT", "x", "MASTER_PORT='x': must be a whole number. Fix: unset it"),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999: a port lies from 1 to 65535. Fix: unset it"),
        ("MASTER_PORT", "0", "MASTER_PORT=0: a port lies"),
        ("MASTER_PORT", "-1", "MASTER_PORT=-1: a port lies"),
        ("DS_ACCELERATOR", "zzz", "DS_ACCELERATOR='zzz': must be one of cuda, cpu. Fix: unset it."),
    ],
)
def test_variables_that_the_libraries_would_trip_over_are_refused(name: str, value: str, part: str) -> None:
    with mock.patch.dict(os.environ, {name: value}), pytest.raises(UserError, match=re.escape(part)) as caught:
        prepare_environment(World())
    assert caught.value.met_by == "node", "one rank tells it"


def test_variables_that_are_set_to_nothing_are_as_good_as_not_set() -> None:
    with mock.patch.dict(os.environ, {"MASTER_PORT": "", "MASTER_ADDR": " ", "DS_ACCELERATOR": ""}):
        prepare_environment(World())
        assert os.environ["MASTER_ADDR"] == "127.0.0.1"
        assert 0 < int(os.environ["MASTER_PORT"]) <= 65535
        assert os.environ.get("DS_ACCELERATOR") in {"cpu", None}


def test_deepspeed_is_not_told_of_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_scale.distributed.has_gpu", lambda: False)
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cuda"}):
        prepare_environment(World())
        with pytest.raises(UserError, match=r"DS_ACCELERATOR=cuda: torch sees no GPU here. Fix: unset it"):
            init_process_group(World(), True, 60)


def test_a_rank_that_is_shown_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_scale.distributed._num_visible_gpus", lambda: 1)
    for launcher in ("srun", "torchrun"):
        with mock.patch.dict(os.environ, {"SLURM_STEP_NODELIST": "node7"}, clear=True):
            export_world(World(3, 4, 3, launcher, 4))
            assert os.environ["LOCAL_RANK"] == "0"


def test_a_rank_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_scale.distributed._num_visible_gpus", lambda: 2)
    monkeypatch.setattr("rm_scale.distributed.has_gpu", lambda: True)
    with mock.patch.dict(os.environ, {}, clear=True):
        export_world(World(3, 4, 3, "torchrun", 4))
        with pytest.raises(UserError, match=r"rank 3 is number 3 on its node, and it sees 2 GPUs: each rank takes one"):
            init_process_group(World(3, 4, 3, "torchrun", 4), False, 60)


def test_alone_collectives_are_the_identity() -> None:
    assert sum_over_ranks([1, 2.5]) == [1.0, 2.5]
    assert gather_from_ranks("x") == ["x"]
    raise_together(None)
    with pytest.raises(DataError, match="broken"):
        raise_together(DataError("broken"))


_LOADING = """
import torch
from rm_scale.distributed import _keep_freed_memory, giving_back_freed_memory
import os

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

_keep_freed_memory()
before = resident()
kept = []
with giving_back_freed_memory():
    for _ in range(30):  # as when weights are quantised: two large blocks that go, a small one that stays
        large = torch.ones(2**25, dtype=torch.uint8)
        larger = large.float()
        kept.append(large[: 2**23].clone())
        del large, larger
stays = sum(one.numel() for one in kept)
print((resident() - before) / stays)
"""


def test_loading_takes_the_memory_of_what_stays() -> None:
    """Blocks that are freed while a model is quantised must not be kept: they are cut up, and new ones are taken."""
    done = subprocess.run([sys.executable, "-c", _LOADING], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5


def test_threads_and_allocator_are_set_before_torch_is_imported() -> None:
    """Both are read when torch is imported; under srun counting the GPUs used to import it first."""
    code = """
import importlib.abc, os, sys
import rm_scale.train
assert "torch" not in sys.modules, "the entry imports torch before the environment is ready"
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ["OMP_NUM_THREADS"], os.environ["PYTORCH_ALLOC_CONF"])
sys.meta_path.insert(0, Watch())
from rm_scale.distributed import detect_world, prepare_environment
world = detect_world()
assert world.launcher == "srun"
prepare_environment(world)
"""
    drop = {"OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "here", "SLURM_JOB_ID": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert done.stdout.splitlines()[0] == f"{threads} expandable_segments:True"


def test_an_allocator_setting_of_the_users_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:256")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    with mock.patch.dict(os.environ):
        prepare_environment(World())
        assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_gloo_follows_the_interface_that_nccl_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside NCCL ranks share numbers over gloo, which would take whatever interface the host's name resolves to."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("rm_scale.distributed.interface_for_gloo", lambda *hosts: "")
    for named, expected in (("=lo", "lo"), ("l", "lo"), ("ib", None), ("^lo", None), ("", None)):
        with mock.patch.dict(os.environ, {"MASTER_ADDR": "10.0.0.1", "NCCL_SOCKET_IFNAME": named}):
            prepare_environment(World(0, 2, 0, "torchrun", 1))
            assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
            os.environ.pop("GLOO_SOCKET_IFNAME", None)


def test_gloo_is_told_of_an_interface_where_the_host_name_is_of_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's `127.0.1.1 NAME`: other nodes would be told to connect to themselves."""
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("rm_scale.network.addresses_of", lambda name: [name] if name[0].isdigit() else ["127.0.1.1"])
    monkeypatch.setattr("rm_scale.network.address_towards", {"10.0.0.1": "10.0.0.7"}.get)
    monkeypatch.setattr("rm_scale.network.interfaces", lambda: {"lo": ["127.0.0.1"], "ib0": ["10.0.0.7"]})
    for named, world, expected in (
        ("", World(1, 4, 1, "deepspeed", 2), "ib0"),
        ("eth7", World(1, 4, 1, "deepspeed", 2), "eth7"),
        ("", World(1, 2, 1, "deepspeed", 2), None),  # all ranks on one machine
    ):
        with mock.patch.dict(os.environ, {"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": named}):
            prepare_environment(world)
            assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


def test_ranks_that_gloo_cannot_connect_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail(**kwargs: object) -> None:
        raise RuntimeError("connect failed: no route")

    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=object()))
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.distributed, "new_group", fail)
    with pytest.raises(UserError, match=r"gloo, .*can't connect them .*no route.* Fix: name the interface"):
        host_group()

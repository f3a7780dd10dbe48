"""Ranks from every launcher's environment, and failures that all ranks agree on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from rm_scale.distributed import World, detect_world, export_world, gather_from_ranks, raise_together, sum_over_ranks
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

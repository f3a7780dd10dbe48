"""How fast a disk takes bytes, and what follows for the first save: on real disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rm_scale.training import write_rate as measured
from rm_scale.training.write_rate import bytes_on_first_node, expected_save, write_rate
from tests.support.launching import REPOSITORY
from tests.support.small_disks import small_disk


def test_a_rate_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    rate = write_rate(tmp_path, 2**22)
    assert rate is not None and rate > 0
    assert list(tmp_path.iterdir()) == []


def test_a_small_model_needs_a_small_measurement(tmp_path: Path) -> None:
    assert write_rate(tmp_path, 10) is not None
    assert write_rate(tmp_path, 0) is None


def test_no_more_is_written_than_a_share_of_what_is_free(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        assert write_rate(disk.path, 2**40) is not None
        disk.fill()
        assert write_rate(disk.path, 2**40) is None
        disk.remount("ro")
        assert write_rate(disk.path, 2**40) is None
    assert write_rate(tmp_path / "missing", 2**20) is None


def test_a_slow_disk_is_not_written_to_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flush takes 0.1 s more than it does here: the second block, twice as large, is not begun."""
    written: list[int] = []
    write, flush = os.write, os.fsync

    def slow(handle: int) -> None:
        flush(handle)
        time.sleep(0.1)

    def counted(handle: int, block: bytes) -> int:
        written.append(len(block))
        return write(handle, block)

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(os, "write", counted)
    monkeypatch.setattr(measured, "MOST_SECONDS", 0.25)
    rate = write_rate(tmp_path, 2**30)
    assert written == [2**18]
    assert rate is not None and rate <= 2**18 / 0.1


WRITER = """
import os, pathlib, signal, sys
from rm_scale.training import write_rate
write_rate.os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
write_rate.write_rate(pathlib.Path(sys.argv[1]), 2**20)
"""


def test_a_kill_in_the_middle_leaves_no_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("world", "per_parameter"), [((1, 1), 16), ((8, 8), 16), ((16, 8), 10), ((32, 8), 7)])
def test_the_first_node_writes_the_weights_and_its_share(
    world: tuple[int, int], per_parameter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(64, 64)
    model.bias.requires_grad_(False)
    for name, value in zip(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"), (*world, 0, 0), strict=True):
        monkeypatch.setenv(name, str(value))
    assert bytes_on_first_node(model) == 64 * 64 * per_parameter


def test_a_save_is_expected_to_take_as_long_as_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "write_rate", lambda folder, most_bytes: 2e6)
    found = expected_save(torch.nn.Linear(1000, 500, bias=False), tmp_path)
    assert found is not None and (found.seconds, found.reason) == (4.0, "0.008 GB at 2 MB/s")
    monkeypatch.setattr(measured, "write_rate", lambda folder, most_bytes: None)
    assert expected_save(torch.nn.Linear(1, 1), tmp_path) is None

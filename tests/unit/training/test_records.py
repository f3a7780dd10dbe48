"""Records on a disk that is full, read-only or gone for a while: nothing is raised, and they come out whole."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rm_scale.training.records import RecordFile, WholeRecord, write_waiting
from rm_scale.training.run_warnings import WarningsFile
from tests.support.small_disks import SmallDisk, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", "64k") as made:
        yield made


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    root = logging.getLogger("rm_scale")
    before, root.propagate = root.propagate, True
    with caplog.at_level(logging.WARNING, "rm_scale"):
        yield caplog
    root.propagate = before


def steps(path: Path) -> list[int]:
    """Every line is a whole object: what they say of their step."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def line(step: int, size: int = 700) -> dict[str, Any]:
    return {"step": step, "text": "x" * size}


def test_lines_wait_for_room_and_come_out_in_order(disk: SmallDisk, said: pytest.LogCaptureFixture) -> None:
    """The disk fills up in the middle of a line, too: sizes are no divisors of a page."""
    record = RecordFile(disk.path / "run" / "metrics.jsonl")
    assert record.append(line(0))
    disk.fill()
    written = [record.append(line(step)) for step in range(1, 20)]
    assert not written[-1] and record.num_waiting > 5
    assert steps(record.path) == list(range(20 - record.num_waiting)), "no part of a line stays meanwhile"
    disk.empty()
    assert record.append(line(20)) and record.num_waiting == 0
    assert steps(record.path) == list(range(21))
    first, second = (entry.getMessage() for entry in said.records)
    assert "metrics.jsonl: can't be written ([Errno 28] No space left on device" in first
    assert "can be written again" in second and "none is lost" in second


def test_a_disk_that_takes_a_part_of_a_line(tmp_path: Path) -> None:
    """The system writes up to a limit in the middle of a line, then refuses; what it took is taken back."""
    record = RecordFile(tmp_path / "metrics.jsonl")
    record.append(line(0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert not record.append(line(1))
        assert steps(record.path) == [0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert record.write_waiting() and steps(record.path) == [0, 1]


def test_a_read_only_disk_and_a_folder_that_is_gone(disk: SmallDisk) -> None:
    record, whole = RecordFile(disk.path / "run" / "steps.jsonl"), WholeRecord(disk.path / "run" / "timing.json")
    assert record.append(line(0)) and whole.write("old")
    disk.remount("ro")
    assert not record.append(line(1)) and not whole.write("new")
    assert whole.path.read_text() == "old"
    disk.remount("rw")
    holder = type("Owner", (), {"records": (record, whole)})()
    assert write_waiting([holder, object()]) == []
    assert (steps(record.path), whole.path.read_text()) == ([0, 1], "new")
    shutil.rmtree(disk.path / "run")
    assert record.append(line(2)) and steps(record.path) == [2]


def test_what_a_killed_process_left_is_ended_first(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st')
    RecordFile(path).append({"step": 1})
    assert path.read_text() == '{"step": 0}\n{"st\n{"step": 1}\n'


def test_memory_is_bounded_and_what_is_lost_is_said(disk: SmallDisk, said: pytest.LogCaptureFixture) -> None:
    record = RecordFile(disk.path / "metrics.jsonl", most_waiting=3)
    disk.fill()
    for step in range(10):
        record.append(line(step))
    disk.empty()
    record.append(line(10))
    assert steps(record.path) == [7, 8, 9, 10]
    assert "3 lines that waited in memory are in it now, 7 older ones are lost" in said.records[-1].getMessage()


def test_warnings_about_the_file_of_warnings_end(disk: SmallDisk) -> None:
    """The warning that warnings can't be written is itself one."""
    handler, root = WarningsFile(), logging.getLogger("rm_scale")
    root.addHandler(handler)
    try:
        handler.begin(disk.path)
        disk.fill()
        for number in range(30):
            root.warning("warning %d: %s", number, "x" * 300)
        disk.empty()
        root.warning("the last")
    finally:
        root.removeHandler(handler)
    texts = [json.loads(each)["text"] for each in (disk.path / "warnings.jsonl").read_text().splitlines()]
    numbers = [int(text.split()[1].rstrip(":")) for text in texts if text.startswith("warning ")]
    assert numbers == list(range(30)) and "the last" in texts
    assert sum("warnings.jsonl: can't be written" in text for text in texts) == 1


def test_a_lone_file_may_be_removed_in_between(tmp_path: Path) -> None:
    record = RecordFile(tmp_path / "a" / "metrics.jsonl")
    (tmp_path / "a").write_text("a file is in the way")
    assert not record.append(line(0))
    os.unlink(tmp_path / "a")
    assert record.append(line(1)) and steps(record.path) == [0, 1]

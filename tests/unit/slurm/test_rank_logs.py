"""What ranks print reaches their logs, and a disk that refuses neither ends nor holds a rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rm_scale.slurm.rank_logs import MOST_WAITING_BYTES, Destination, RankOutput, log_file


class Disk:
    """A log on a disk that is full until `has_room`; /dev/full stands for it, with the system's own error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_room = False
        self.said: list[str] = []
        self.log = Destination("the log", self._open, self.said.append)

    def _open(self) -> int:
        path = self.path if self.has_room else Path("/dev/full")
        return os.open(path, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if self.has_room else 0), 0o644)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_scale.slurm.rank_logs.RETRY_SECONDS", 0.05)


def read_all(output: RankOutput, pipe: int, blocks: list[bytes]) -> None:
    """Print these as a rank would."""
    for block in blocks:
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(pipe, rest) :]


def until(done: object) -> None:
    end = time.monotonic() + 600
    while not done():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_disk_holds_nobody_up_and_the_loss_is_said(tmp_path: Path) -> None:
    """The copying thread ended, the pipe filled, and training hung."""
    disk = Disk(tmp_path / "log")
    reading, writing = os.pipe()
    output = RankOutput(reading, [disk.log])
    output.begin()
    lines = [b"line %06d %s\n" % (number, b"x" * 100) for number in range(3 * MOST_WAITING_BYTES // 113)]
    read_all(output, writing, lines)  # ends although nothing can be written
    until(lambda: disk.log._lost_lines > 0)
    disk.has_room = True
    assert disk.log.drain(600)
    read_all(output, writing, [b"the end\n"])
    os.close(writing)
    assert output.close(600) == []
    text = disk.path.read_bytes()
    assert text.startswith(lines[0]) and text.endswith(b"they could not be written\nthe end\n")
    kept = text.split(b"\nrm_scale: about ")[0]
    assert kept.count(b"\n") > 5000 and kept in b"".join(lines), "what was kept is in order and without gaps"
    assert "can't be written (No space left on device)" in disk.said[0] and "can be written again" in disk.said[1]
    assert len(disk.said) == 2


def test_one_disk_that_refuses_keeps_nothing_from_another(tmp_path: Path) -> None:
    disk, other = Disk(tmp_path / "full"), tmp_path / "other"
    reading, writing = os.pipe()
    output = RankOutput(reading, [disk.log, log_file(other, disk.said.append)])
    output.begin()
    read_all(output, writing, [b"hello\n"])
    os.close(writing)
    assert output.close(0.5) == ["the log"], "it is named; the job ends all the same"
    assert other.read_bytes() == b"hello\n"


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """A pipe that nobody reads stands for it: to open it waits for ever, as on a network disk that is away."""
    hung, other = tmp_path / "hung", tmp_path / "other"
    os.mkfifo(hung)
    reading, writing = os.pipe()
    output = RankOutput(reading, [log_file(hung, print), log_file(other, print)])
    output.begin()
    read_all(output, writing, [b"x" * 65536] * 30 + [b"\nlast words\n"])
    os.close(writing)
    assert output.last_words(1, 600) == ["last words"]
    assert output.close(0.5) == [str(hung)]
    assert other.read_bytes().endswith(b"last words\n")
    os.close(os.open(hung, os.O_RDONLY | os.O_NONBLOCK))  # lets the waiting thread go


def test_last_words_are_not_lost_when_something_keeps_the_pipe_open(tmp_path: Path) -> None:
    """A process that the rank has started outlives it."""
    code = "import os,subprocess; subprocess.Popen(['sleep', '600']); print('x' * 300_000); print('last words')"
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert rank.stdout is not None
    output = RankOutput(rank.stdout.fileno(), [log_file(tmp_path / "log", print)])
    output.begin()
    try:
        assert rank.wait(600) == 0
        assert output.close(600) == []
        assert (tmp_path / "log").read_text().endswith("last words\n")
    finally:
        os.killpg(rank.pid, 9)

"""Standard output and error on a full disk, into a broken pipe, and into one that nobody reads: the process goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launching import REPOSITORY
from tests.support.small_disks import SmallDisk, small_disk

OUTLAST = "from rm_scale.training.lasting_streams import outlast_full_disks; outlast_full_disks()\n"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", "64k") as made:
        yield made


def start(code: str, stdout: int | None = None, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "RANK": "3", **env},
    )


FULL = """
import sys
print("first", flush=True)
sys.stdin.readline()
for number in range(2000):
    print("line", number)
sys.stdout.flush()
print("told", file=sys.stderr, flush=True)
sys.stdin.readline()
print("after")
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_log_on_a_full_disk_goes_on_when_there_is_room(disk: SmallDisk, unbuffered: str) -> None:
    log = disk.path / "log"
    with log.open("w") as file:
        process = start(OUTLAST + FULL, file.fileno(), PYTHONUNBUFFERED=unbuffered)
    assert process.stdin is not None and process.stderr is not None
    while not log.read_text():
        assert process.poll() is None
    disk.fill()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stderr.readline() == "told\n"
    disk.empty()
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    lines = log.read_text().split("\n")
    (notice,) = (line for line in lines if "could not be written" in line)
    whole = [line for line in lines if line.startswith("line ")]
    last = lines[lines.index(notice) - 1]
    lost = int(notice.split("WARNING ")[1].split()[0].replace(",", ""))
    # The line that was cut counts as lost, and its beginning stands in the log.
    is_cut = last != f"line {len(whole) - 1}" or lost + len(whole) > 2000
    assert lost + len(whole) == 2000 + is_cut, notice
    assert notice.startswith("[rm_scale rank 3] WARNING") and notice.endswith("No space left on device")
    assert lines[-2:] == ["after", ""]


def test_a_full_disk_to_the_end_leaves_the_exit_code(disk: SmallDisk) -> None:
    disk.fill()
    with (disk.path / "log").open("w") as file:
        plain = start("print('x' * 100); import sys; sys.exit(85)", file.fileno())
        lasting = start(OUTLAST + "print('x' * 100); import sys; sys.exit(85)", file.fileno())
    assert plain.wait(60) in (1, 120), "what Python makes of it without our streams"
    assert lasting.wait(60) == 85


@pytest.mark.parametrize("another_user", [False, True])
def test_a_pipe_that_breaks_or_is_not_read_holds_nobody_up(another_user: bool) -> None:
    """Another user's pipe, such as Slurm's, can't be opened once more without blocking."""
    if another_user and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    fill = "import os, sys\n" + ("os.setuid(65534)\n" if another_user else "")
    fill += "for _ in range(3000):\n    print('x' * 100)\nsys.stdout.flush()\n"
    reading, writing = os.pipe()
    os.close(reading)
    broken = start(OUTLAST + fill, writing)
    os.close(writing)
    assert broken.wait(60) == 0
    reading, writing = os.pipe()
    patience = "import rm_scale.training.lasting_streams as module\nmodule.PATIENCE_SECONDS = 0.2\n"
    stuck = start(patience + OUTLAST + fill + "sys.stdin.readline()\nprint('after')\n", writing)
    os.close(writing)
    assert stuck.stdin is not None
    with os.fdopen(reading) as pipe:
        # The process waits for its input by now or soon; whatever lies in the pipe is read, then the rest.
        stuck.stdin.write("\n")
        stuck.stdin.flush()
        assert stuck.stderr is not None
        assert stuck.stderr.read() == "", "it has ended by itself, with the pipe still full"
        text = pipe.read()
    assert stuck.wait(60) == 0 and 0 < text.count("\n") < 3000


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_it_is_a_text_stream_like_any_other(tmp_path: Path, unbuffered: str) -> None:
    names = ("name", "mode", "encoding", "errors", "line_buffering", "write_through", "newlines", "closed")
    code = (
        "import os, subprocess, sys\n"
        "def facts():\n"
        f"    return [[s.fileno(), s.isatty(), *(getattr(s, n) for n in {names})] for s in (sys.stdout, sys.stderr)]\n"
        "before = facts()\n"
        f"{OUTLAST}"
        "assert type(sys.stdout).__name__ == '_LastingStream' and sys.stdout is sys.__stdout__\n"
        "assert facts() == before, (facts(), before)\n"
        "sys.stdout.write('ä')\n"
        "sys.stdout.flush()\n"
        "sys.stdout.buffer.write(b'b')\n"
        "sys.stdout.flush()\n"
        "print('c', flush=True)\n"
        "os.system('echo d')\n"
        "subprocess.run(['echo', 'e'], stdout=sys.stdout, check=True)\n"
        "sys.stdout.reconfigure(line_buffering=True)\n"
        "print('f')\n"
        "os._exit(0)\n"
    )
    with (tmp_path / "log").open("w") as file:
        process = start(code, file.fileno(), PYTHONUNBUFFERED=unbuffered)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (tmp_path / "log").read_text() == "äbc\nd\ne\nf\n"

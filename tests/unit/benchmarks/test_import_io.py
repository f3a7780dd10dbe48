"""`benchmarks/import_io.py`: what it counts, and the arithmetic of its estimate."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.import_io import CALLS, Disk, count, over_nfs, packed, resident_of

TRACE = """\
7 openat(AT_FDCWD</x>, "/env/a.py", O_RDONLY|O_CLOEXEC) = 3</env/a.py>
7 read(3</env/a.py>, "import b", 4096) = 8
7 openat(AT_FDCWD</x>, "/env/a.py", O_RDONLY) = 3</env/a.py>
8 openat(AT_FDCWD</x>, "/env/lib.so", O_RDONLY <unfinished ...>
7 newfstatat(AT_FDCWD</x>, "/env/b.py", 0x7ffe, 0) = -1 ENOENT (No such file or directory)
8 <... openat resumed>) = 4</env/lib.so>
8 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 4</env/lib.so>, 0) = 0x7f
7 newfstatat(3</env/a.py>, "", {st_mode=S_IFREG}, AT_EMPTY_PATH) = 0
7 newfstatat(AT_FDCWD</env>, "sub", {st_mode=S_IFDIR}, 0) = 0
7 getdents64(5</env/sub>, 0x55 /* 3 entries */, 32768) = 80
7 openat(AT_FDCWD</x>, "/etc/passwd", O_RDONLY) = 3</etc/passwd>
7 read(3</etc/passwd>, "root", 4096) = 4
7 +++ exited with 0 +++
"""


def test_calls_are_counted_by_file() -> None:
    counted = count(TRACE.splitlines(keepends=True), ("/env/",))
    assert counted.opened == {"/env/a.py": 2, "/env/lib.so": 1}
    assert counted.missed == {"/env/b.py"} and counted.asked == {"/env/sub"} and counted.listed == {"/env/sub"}
    assert counted.mapped == {"/env/lib.so"} and counted.bytes_read == 8 and counted.num_calls == 5


def test_a_real_trace(tmp_path: Path) -> None:
    """The installed strace writes what is read above."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace here")
    (tmp_path / "there").write_text("12345")
    code = f"cat {tmp_path}/there; test -e {tmp_path}/not_there"
    log = tmp_path / "log"
    trace = ["strace", "-f", "-qq", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(log), "sh", "-c", code]
    done = subprocess.run(trace, capture_output=True, check=False)
    if b"PTRACE" in done.stderr or b"Operation not permitted" in done.stderr:
        pytest.skip("processes can't be traced here")
    counted = count(log.read_text().splitlines(), (f"{tmp_path}/",))
    assert counted.opened == {f"{tmp_path}/there": 1} and counted.bytes_read == 5
    assert f"{tmp_path}/not_there" in counted.missed


def test_pages_of_the_environment_are_counted() -> None:
    maps = "7f00-7f10 r-xp 00000000 08:01 5 /env/lib.so\nSize: 8 kB\nRss:   4 kB\n"
    maps += "7f20-7f30 r-xp 00000000 08:01 6 /usr/lib/libc.so\nRss:   64 kB\n7f40-7f50 rw-p 0 00:00 0 \nRss: 9 kB\n"
    assert resident_of(maps, ("/env/",)) == 4096


def test_the_estimate_grows_with_what_the_server_must_answer() -> None:
    figures = {
        **{"lookups_missed": 100, "names_found": 100, "folders_listed": 100, "files_opened": 100, "opens": 100},
        **{"bytes_read": 10**9, "bytes_mapped_resident": 0},
    }
    disk = Disk(latency_ms=1, server_ops=1000, server_gb_s=4, node_gb_s=1, ranks_per_node=8)
    one, many = over_nfs(figures, disk, 1), over_nfs(figures, disk, 100)
    assert one["operations"] == 500 + 800 and one["seconds"] == pytest.approx(0.6 + 1)
    assert many["seconds"] == pytest.approx(130)
    assert packed(2e9, 3, disk, 1)["seconds"] == 3 and packed(2e9, 3, disk, 100)["seconds"] == pytest.approx(191.7, 0.1)

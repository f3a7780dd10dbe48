"""DeepSpeed's hostfile: what it may hold, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rm_scale.errors import UserError
from rm_scale.launch.hostfile import read_hostfile


def test_hosts_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\nnode1 slots=8\n\nnode0 slots=4  # the small one\n")
    assert list(read_hostfile(str(tmp_path / "hosts")).items()) == [("node1", 8), ("node0", 4)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("node1 slots=4\nnode2 slots=x\n", ", line 2: 'node2 slots=x' is not one new host. Fix: write 'HOST slots=N'."),
        ("node1\n", ", line 1: 'node1' is not one new host. Fix: write 'HOST slots=N'."),
        ("a slots=0\n", ", line 1: 'a slots=0' is not one new host. Fix: write 'HOST slots=N'."),
        ("a slots=2\na slots=2\n", ", line 2: 'a slots=2' is not one new host. Fix: write 'HOST slots=N'."),
        (f"{'a' * 5000}\n", f", line 1: '{'a' * 200}...' is not one new host. Fix: write 'HOST slots=N'."),
        ("# nothing\n", ": names no host. Fix: write 'HOST slots=N' lines."),
        ("", ": names no host. Fix: write 'HOST slots=N' lines."),
    ],
)
def test_bad_hostfiles_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(str(file))
    assert str(caught.value) == f"hostfile={file}{problem}"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can't be read \(No such file or directory\)\. Fix: check the path\."):
        read_hostfile(str(tmp_path / "none"))

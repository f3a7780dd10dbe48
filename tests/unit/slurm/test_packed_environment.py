"""`rm-scale slurm pack` and slurm/common/packed_python.sh: a real small environment, packed, unpacked and started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rm_scale.cli import main
from rm_scale.errors import ConfigError, UserError
from rm_scale.slurm.packed_environment import entries_of, pack, read_environment
from tests.support.packed import make_small_environment

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "slurm" / "common" / "packed_python.sh"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with one package and one script of its own."""
    return make_small_environment(tmp_path_factory.mktemp("small") / "venv")


@pytest.fixture(scope="module")
def archive(small: Path) -> Path:
    """The same, packed."""
    output = small.parent / "env.tar"
    assert main(["slurm", "pack", "--venv", str(small), "--output", str(output)]) == 0
    return output


def start(archive: Path, root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start Python as a node does."""
    env = {"PATH": "/usr/bin:/bin", "SLURMD_NODENAME": "node7", **variables}
    command = ["bash", str(SCRIPT), str(archive), str(root), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd="/", check=False, timeout=600)


def copies(root: Path) -> list[Path]:
    """The unpacked environments."""
    return [path for path in sorted(root.iterdir()) if path.is_dir()]


WHERE = "import sys, small, rm_scale; print(sys.prefix, small.__file__, rm_scale.__file__, sys.base_prefix, sep='\\n')"


def test_python_runs_from_the_nodes_copy(archive: Path, tmp_path: Path) -> None:
    root = tmp_path / "local disk"
    first = start(archive, root, "-c", WHERE)
    assert first.returncode == 0, first.stderr
    (copy,) = copies(root)
    places = first.stdout.splitlines()
    assert places[0] == str(copy) and all(place.startswith(f"{copy}/") for place in places[1:3])
    assert "rm_scale node7: unpacked" in first.stderr
    if not sys.base_prefix.startswith("/usr"):
        assert places[3] == str(copy / "base")
    again = start(archive, root, "-c", WHERE)
    assert again.stdout == first.stdout and again.stderr == ""
    assert root.stat().st_mode & 0o777 == 0o700
    # Ready files beside the package, and the scripts on PATH start this Python.
    assert list(copy.glob("lib/python3*/site-packages/rm_scale/shipped/slurm/common.sh"))
    tool = start(archive, root, "-c", "import subprocess; print(subprocess.check_output(['small-tool'], text=True))")
    assert tool.stdout.strip() == f"tool {copy}", tool.stderr


def test_no_shell_stays_and_the_copy_is_locked(archive: Path, tmp_path: Path) -> None:
    code = "import os; print(os.getpid()); print(open('/proc/self/cmdline').read().split(chr(0))[0])"
    code += "; print([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if int(n) == 9])"
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(archive), str(tmp_path / "r"), "-c", code], stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate(timeout=600)
    pid, name, locked = out.splitlines()
    assert int(pid) == process.pid and name.endswith("/bin/python") and locked.endswith(".used']")


def test_many_at_once_unpack_once(archive: Path, tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), str(archive), str(tmp_path / "r"), "-c", "import small"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("unpacked" in text for text in said) == 1 and len(copies(tmp_path / "r")) == 1


def test_an_interrupted_unpacking_is_not_used(archive: Path, tmp_path: Path) -> None:
    """Neither the half of a killed process nor a copy from which a cleaner of /tmp took files."""
    root = tmp_path / "r"
    start(archive, root, "-V")
    (copy,) = copies(root)
    left = root / f"{copy.name.replace('env', 'part')}.killed"
    shutil.copytree(copy, left, symlinks=True)
    next(copy.glob("lib/python3*/site-packages/small/__init__.py")).unlink()
    done = start(archive, root, "-c", WHERE)
    assert done.returncode == 0 and "unpacked" in done.stderr
    assert copies(root) == [copy]


def test_a_truncated_archive_and_a_full_disk_are_refused(archive: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    done = start(cut, tmp_path / "r", "-V")
    assert done.returncode == 2 and "node7: RM_SCALE_PACKED_ENV=" in done.stderr and "can't be unpacked" in done.stderr
    assert copies(tmp_path / "r") == []
    missing = start(tmp_path / "none.tar", tmp_path / "r", "-V")
    assert missing.returncode == 2 and "can't be read on this node" in missing.stderr


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("file systems can't be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named(archive: Path, tiny_disk: Path) -> None:
    done = start(archive, tiny_disk / "r", "-V")
    assert done.returncode == 2 and f"node7: {tiny_disk}/r has " in done.stderr and "MB free" in done.stderr
    assert "Fix: " in done.stderr and copies(tiny_disk / "r") == []


def test_old_copies_are_removed_but_not_those_in_use(small: Path, archive: Path, tmp_path: Path) -> None:
    root = tmp_path / "r"
    start(archive, root, "-V")
    (old,) = copies(root)
    os.utime(f"{old}.used", (1, 1))
    foreign = root / "env-foreign"
    foreign.mkdir()
    (root / "env-foreign.used").touch()
    os.utime(root / "env-foreign.used", (1, 1))
    (small / "added.txt").write_text("another environment")
    newer = tmp_path / "newer.tar"
    pack(read_environment(small), newer)
    (small / "added.txt").unlink()
    hold = ["flock", "-s", f"{old}.used", "sh", "-c", "echo; read x"]
    held = subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None and held.stdout.readline() == "\n"
    start(newer, root, "-V")
    assert old.is_dir() and foreign.is_dir() and len(copies(root)) == 3
    held.communicate("\n")
    shutil.rmtree(next(path for path in copies(root) if path not in (old, foreign)))
    done = start(newer, root, "-V")
    assert not old.exists() and foreign.is_dir() and f"removed {old}" in done.stderr


def test_a_folder_of_somebody_else_is_refused(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "r").symlink_to(tmp_path / "theirs")
    done = start(archive, tmp_path / "r", "-V")
    assert done.returncode == 2 and "belongs to somebody else" in done.stderr


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.zst"])
def test_compressed(small: Path, tmp_path: Path, ending: str) -> None:
    if shutil.which({".tar.gz": "gzip", ".tar.zst": "zstd"}[ending]) is None:
        pytest.skip("its compressor is not here")
    output = tmp_path / f"env{ending}"
    packed = pack(read_environment(small), output)
    assert packed.archive_bytes < packed.num_bytes / 2
    assert start(output, tmp_path / "r", "-c", "import small").returncode == 0


def test_the_key_is_of_the_content(small: Path, tmp_path: Path) -> None:
    keys = [pack(read_environment(small), tmp_path / "a.tar").key for _ in range(2)]
    (small / "more.txt").write_text("x")
    keys.append(pack(read_environment(small), tmp_path / "a.tar").key)
    (small / "more.txt").unlink()
    assert keys[0] == keys[1] != keys[2]


def test_names_can_be_left_out(small: Path) -> None:
    names = [entry.name for entry in entries_of(read_environment(small), ["lib/*/site-packages/small"])]
    assert not [name for name in names if "site-packages/small/" in name or name.endswith("/small")]


def test_editable_installs_and_path_files_are_refused(small: Path, tmp_path: Path) -> None:
    root = tmp_path / "venv"
    shutil.copytree(small, root, symlinks=True)
    site = next(root.glob("lib/python3*/site-packages"))
    outside = tmp_path / "theirs"
    outside.mkdir()
    (site / "theirs.pth").write_text(f"import os\n{outside}\n")
    for name in ("theirs", "rm_scale"):
        (site / f"{name}-1.dist-info").mkdir()
        record = {"url": f"file://{outside}", "dir_info": {"editable": True}}
        (site / f"{name}-1.dist-info" / "direct_url.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError) as refused:
        pack(read_environment(root), tmp_path / "a.tar")
    assert len(refused.value.problems) == 2 and "pip install --no-deps" in str(refused.value)
    assert f"theirs.pth adds {outside}" in str(refused.value) and not (tmp_path / "a.tar").exists()


def test_what_can_not_be_packed(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"has no pyvenv.cfg"):
        read_environment(tmp_path)
    root = tmp_path / "venv"
    shutil.copytree(small, root, symlinks=True)
    (root / "bin" / "python").unlink()
    (root / "bin" / "python").symlink_to("/nowhere/python3")
    with pytest.raises(UserError, match=r"is the interpreter that it was made with still there \(/nowhere/python3\)"):
        read_environment(root)
    for output, told in (("env.zip", "must end in .tar"), ("none/env.tar", "there is no folder")):
        assert main(["slurm", "pack", "--venv", str(small), "--output", str(tmp_path / output)]) == 2
        assert told in capsys.readouterr().err


def test_links(small: Path, tmp_path: Path) -> None:
    """A link to a file outside is replaced by the file, as of caches; one inside stays one."""
    root = tmp_path / "venv"
    shutil.copytree(small, root, symlinks=True)
    (tmp_path / "cached.py").write_text("x = 1\n")
    (root / "outside.py").symlink_to(tmp_path / "cached.py")
    (root / "inside.cfg").symlink_to(root / "pyvenv.cfg")
    pack(read_environment(root), tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getmember("outside.py").isreg() and archive.getmember("inside.cfg").linkname == "pyvenv.cfg"
    (root / "folder").symlink_to(tmp_path)
    with pytest.raises(UserError, match="not in the environment"):
        pack(read_environment(root), tmp_path / "a.tar")

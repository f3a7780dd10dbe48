"""Files are whole or absent, whatever is killed in between, and a torn line costs only itself."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rm_scale.errors import UserError
from rm_scale.files import (
    append_json_line,
    existing_parent,
    naming,
    read_json_lines,
    read_json_object,
    replacing,
    sha256_of_file,
    user_path,
    write_problem,
    write_whole,
)

UNICODE = "größer \N{GRINNING FACE} a\N{LINE SEPARATOR}b\x85c"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_writes_and_replaces(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.json"
    for text in ("first, and longer", UNICODE):
        assert write_whole(path, text, durable=durable) == path
        assert path.read_bytes().decode() == text
    assert names(tmp_path) == ["a.json"]


def test_readers_see_the_old_content_until_the_end(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a.json", "old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
        assert aside.parent == path.parent, "a rename works on one file system alone"
        assert list(tmp_path.glob("*.json")) == [path], "no search by ending finds the temporary file"
    assert path.read_text() == "new"


def test_two_writers_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as two:
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert names(tmp_path) == ["a"]


def test_a_failed_block_leaves_no_trace(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_failed_rename_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "folder" / "in it").mkdir(parents=True)
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", "text")
    assert names(tmp_path) == ["folder"]


def test_an_error_of_the_disk_is_the_one_that_is_seen(tmp_path: Path) -> None:
    """No folder: neither the writing nor the removal of the temporary file works, and the first one counts."""
    with pytest.raises(FileNotFoundError, match=r"a\.json"):
        write_whole(tmp_path / "none" / "a.json", "text")


def test_a_kill_between_writing_and_renaming_keeps_the_old_file(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a.json", '{"old": 1}')
    code = (
        "import os, signal, sys; from pathlib import Path; from rm_scale.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as aside:\n"
        "    aside.write_text('new'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == '{"old": 1}'
    assert len(names(tmp_path)) == 2, "the kill came too late: nothing was written aside"
    assert list(tmp_path.glob("*.json")) == [path]
    assert write_whole(path, "{}").read_text() == "{}"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = write_whole(tmp_path / "a", "text")
        append_json_line(tmp_path / "b", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o666 & ~umask


def test_durable_means_content_before_name_and_name_before_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    done: list[tuple[str, bool]] = []

    def note_sync(handle: int) -> None:
        done.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, path.exists()))

    monkeypatch.setattr(os, "fsync", note_sync)
    write_whole(path, "text")
    assert done == []
    path.unlink()
    write_whole(path, "text", durable=True)
    (first, was_there), (second, is_there) = done
    assert first.endswith(".writing") and not was_there
    assert second == tmp_path.name and is_there


# --- JSON lines ------------------------------------------------------------------------------------------------------


def test_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    records = [{"text": UNICODE}, {"b": [1, None, 0.5]}]
    for record in records:
        append_json_line(path, record)
    assert read_json_lines(path) == records
    assert path.read_text() == "".join(json.dumps(record) + "\n" for record in records)


def test_lines_with_unescaped_separators_come_back(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 in a string, and `str.splitlines` would split there."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": UNICODE}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_json_lines(path) == [{"text": UNICODE}]


@pytest.mark.parametrize("size", range(1, len('{"step": 2}')))
def test_a_torn_line_costs_only_itself(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    append_json_line(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2}'[:size])
    assert read_json_lines(path) == [{"step": 1}]
    append_json_line(path, {"step": 3})
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


def test_a_whole_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}')
    append_json_line(path, {"step": 2})
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_what_is_no_object_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'7\n[1]\n\n"text"\n{"text": "cut \xe2\x82"}\r\n{"a": 1}\r\nnull\n\xff\xfe\n')
    assert read_json_lines(path) == [{"text": "cut \N{REPLACEMENT CHARACTER}"}, {"a": 1}]
    assert read_json_lines(tmp_path / "none") == []
    assert read_json_lines(tmp_path) == [], "a folder"


def _append_many(path: Path, name: str, count: int) -> None:
    for number in range(count):
        # Longer than any buffer of the standard library, so that a line in two writes would be seen.
        append_json_line(path, {"name": name, "number": number, "text": name * 20_000})


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    path, count = tmp_path / "a.jsonl", 150
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(path, name, count)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(600)
        assert writer.exitcode == 0
    found = read_json_lines(path)
    for name in "ab":
        mine = [record for record in found if record["name"] == name]
        assert [record["number"] for record in mine] == list(range(count))
        assert all(record["text"] == name * 20_000 for record in mine)


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b'{"a": {"b": 1}}', {"a": {"b": 1}}), (b"[1]", {}), (b'{"a": ', {}), (b"", {}), (b'{"a": "\xff"}', {})],
)
def test_an_object_or_nothing(tmp_path: Path, content: bytes, expected: dict[str, object]) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_json_object(tmp_path / "a.json") == expected
    assert read_json_object(tmp_path / "none.json") == {}


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert existing_parent(tmp_path) == tmp_path
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path / "file" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert existing_parent(Path("a")) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert existing_parent(Path("~/a/b")) == tmp_path

    with pytest.raises(UserError, match="no user of this machine has the home ~nosuch"):
        existing_parent(Path("~nosuch/a"))


def test_a_persons_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a" and user_path(Path("~")) == tmp_path
    assert user_path("a/~/b") == Path("a/~/b") and user_path("") == Path()
    for wrong, said in (("~nosuch/a", "~nosuch/a: no user"), ("a\0b", "NUL")):
        with pytest.raises(UserError, match=said):
            user_path(wrong)


@pytest.mark.parametrize("aside", [None, Path("hidden")])
@pytest.mark.parametrize("error", [gzip.BadGzipFile("Not a gzipped file (b'ab')"), OSError("bare"), EOFError("short")])
def test_what_is_no_failed_write_keeps_its_own_words(error: Exception, aside: Path | None) -> None:
    text = str(error)
    with pytest.raises(type(error)) as met, naming(Path("raw.arrow"), aside):
        raise error
    assert str(met.value) == text


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), FileNotFoundError(errno.ENOENT, "no", "hidden")])
def test_a_failed_write_names_the_file_that_is_written(error: OSError) -> None:
    with pytest.raises(OSError) as met, naming(Path("scores.jsonl"), Path("hidden")):
        raise error
    assert met.value.filename == "scores.jsonl"


def test_needs_the_standard_library_alone() -> None:
    """It is imported by what Slurm starts on every node, where a second of imports is a second of all nodes."""
    code = (
        "import sys; import rm_scale; before = set(sys.modules); import rm_scale.files\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "sys.exit(' '.join(new - sys.stdlib_module_names - {'rm_scale'}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "[" * 200 + "]" * 200 + "}"])
def test_what_is_nested_without_end_is_as_good_as_half_written(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert read_json_object(path) == {}
    path.write_text(f'{{"a": 1}}\n{content}\n{{"a": 2}}\n')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]


def test_a_pipe_in_a_records_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert read_json_object(tmp_path / "a.json") == {}
    assert read_json_lines(tmp_path / "a.json") == []


def test_where_nothing_can_be_made(tmp_path: Path) -> None:
    assert write_problem(tmp_path) is None and write_problem(tmp_path / "new" / "deep") is None
    assert write_problem(Path("/proc/h")) == "No such file or directory"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert write_problem(tmp_path / "file" / "x") == f"{tmp_path / 'file'} is a file"

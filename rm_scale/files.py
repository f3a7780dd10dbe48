"""How files are written and read everywhere: whole or not at all, one JSON line at a time; and a free port.

Standard library only: the Slurm commands that run on every node import it and must start at once.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fnmatch
import glob
import hashlib
import itertools
import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rm_scale.errors import UserError
from rm_scale.json_values import parse_json
from rm_scale.texts import one_line

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)

# --- Writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(path: Path, aside: Path | None = None) -> Iterator[None]:
    """Let an error of the system that ends the block name the file that is written in it: a failed write names none.

    Args:
        path: the name to show.
        aside: a name that the user has never seen, to show `path` for.
    """
    try:
        yield
    except OSError as error:
        is_a_write = error.filename is None and error.errno in _WRITE_ERRORS
        is_aside = aside is not None and error.filename in (aside, str(aside))
        if is_a_write or is_aside:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a name to write to; when the block has ended, that file takes the place of `path` by one rename.

    Readers see the old content or the new, never a part, and so does whoever comes after a kill. When the block or the
    rename fails, the temporary file is removed and `path` stays as it was. Writers at the same moment, on whatever
    machine, don't meet: each has a temporary name of its own, hidden, in the folder of `path` and ending in
    ".writing", so that no search for the files of a folder by their ending takes it for one. Permissions are those of
    any new file (0666 less the umask).

    Args:
        path: the file to make or replace; its folder exists.
        durable: return only when content and name are on the disk. Without it a crash of the machine, not of the
            process, may leave an empty file.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.writing")
    try:
        with naming(path, aside):
            yield aside
            if durable:
                sync(aside)
            os.replace(aside, path)
    except BaseException:
        # Whatever happened is the news, not that the disk refuses this as well.
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_whole(path: str | Path, text: str, *, durable: bool = False) -> Path:
    """Write a text as UTF-8, whole or not at all; return the path. See `replacing`."""
    path = Path(path)
    with replacing(path, durable=durable) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def append_json_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add one JSON object as a line of its own, making file and folder when they are missing.

    The line is written by one call, so that lines of several processes on one machine don't mix. What a killed process
    left of its last line is ended first: only that line is lost.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record).encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        written = file.write(line)
        if written < len(line):  # a full disk: the next call raises what is wrong
            file.write(line[written:])


def sync(path: Path) -> None:
    """Have the system write a file or a folder's list of names to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_small_text(path: str | Path, most_bytes: int) -> str:
    """Return the text of a file that a person wrote.

    Args:
        path: the file.
        most_bytes: a larger file is refused: it is something else.

    Raises:
        ValueError: it can't be read, is a device or a pipe (which might never end), is too large, or is not UTF-8; the
            text says which, in words that fit behind the file's name.
    """
    path = Path(path)
    try:
        what = not_a_file(path)
        if what is not None:
            raise ValueError(what)
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    if len(content) > most_bytes:
        raise ValueError(f"larger than {most_bytes:,} bytes")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("is written in UTF-16, not in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"is not written in UTF-8, line {line}; in Latin-1?") from error


def not_a_file(path: Path) -> str | None:
    """Return what a path is when it is neither file nor folder, since reading it might never end; else `None`.

    Raises:
        OSError: it is not there, or may not be looked at.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return "a pipe, not a file" if stat.S_ISFIFO(mode) else "a device or socket, not a file"


_OF_A_MODEL = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin", ".pt", ".py")


def endless_model_file(folder: Path) -> str | None:
    """Return the first file of a model's folder that may never end, and what it is; `None` when there is none.

    Libraries that load models open whatever has the right name, and wait for a pipe for ever.
    """
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_OF_A_MODEL) and path.exists():
            what = not_a_file(path)
            if what is not None:
                return f"{path.name} is {what}"
    return None


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a file that another process may be writing to; none when it can't be read.

    Lines that are no JSON object are left out: the last one may be half-written, as may any line that a killed process
    began. A pipe or device is not read: that might never end.
    """
    try:
        if not_a_file(Path(path)) is not None:
            return []
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.split("\n"):  # splitlines() would split at U+2028 as well, which JSON allows inside a string
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict):
                found.append(record)
    return found


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty when there is no such file, or it holds or is anything else."""
    try:
        if not_a_file(Path(path)) is not None:
            return {}
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Paths -----------------------------------------------------------------------------------------------------------


def user_path(given: str | Path) -> Path:
    """Return the path that a person wrote; "~" or "~USER" at its start is that user's home.

    Raises:
        UserError: it holds a NUL, or there is no such user.
    """
    text = str(given)
    if "\0" in text:
        raise UserError(f"{one_line(text, 200)!r}: holds a NUL, which no name of a file can. Fix: correct the path.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = one_line(text.partition("/")[0], 80)
        raise UserError(
            f"{one_line(text, 200)}: no user of this machine has the home {user}. Fix: write the folder's whole path."
        ) from error


def existing_parent(path: Path) -> Path:
    """Return the path itself, absolute, or the nearest folder above it that exists.

    Raises:
        UserError: see `user_path`.
    """
    path = user_path(path).absolute()
    return next(place for place in [path, *path.parents] if place.is_dir())


def write_problem(folder: Path) -> str | None:
    """Return why nothing can be made in a folder, or in the nearest one above it that exists; `None` when it can.

    A folder is made there and removed: permissions alone don't tell, as with /proc.
    """
    path = user_path(folder).absolute()
    place = next(place for place in [path, *path.parents] if os.path.exists(place))
    if not place.is_dir():
        return f"{place} is a file"
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".rm_scale-", dir=place))
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


_MOST_FILES = 10_000
_MOST_FOLDERS = 10_000


def files_of_pattern(pattern: str) -> list[str]:
    """Return what a pattern such as `data/**/*.jsonl` matches, sorted.

    Raises:
        ValueError: it leads through too many folders, as `/**/*.jsonl` does through all disks, or matches too many
            files; the text is rule and fix.
    """
    parts = Path(pattern).parts
    is_rooted = parts[:1] == ("/",)
    _count_folders(Path("/" if is_rooted else "."), parts[is_rooted:], 0)
    found = sorted(itertools.islice(glob.iglob(pattern, recursive=True), _MOST_FILES + 1))
    if len(found) > _MOST_FILES:
        raise ValueError(
            f"the pattern matches more than {_MOST_FILES:,} files. Fix: a narrower pattern, or put their rows into "
            "fewer files."
        )
    return found


def _count_folders(folder: Path, parts: Sequence[str], looked_into: int) -> int:
    """Return how many folders `glob` looks into for the rest of a pattern, and for what was before.

    Args:
        folder: where the rest begins.
        parts: the rest of the pattern, name by name.
        looked_into: folders looked into before.
    """
    place = next((number for number, part in enumerate(parts) if glob.has_magic(part)), None)
    if place is None:
        return looked_into
    if looked_into >= _MOST_FOLDERS:
        raise ValueError(
            f"the pattern leads through more than {_MOST_FOLDERS:,} folders. Fix: begin it with the folder in which "
            "the files lie."
        )
    folder, part, rest = folder.joinpath(*parts[:place]), parts[place], parts[place + 1 :]
    looked_into += 1
    if part == "**":
        looked_into = _count_folders(folder, rest, looked_into)
    elif not rest:
        return looked_into
    for inner in _folders_in(folder, "*" if part == "**" else part):
        looked_into = _count_folders(inner, parts[place:] if part == "**" else rest, looked_into)
    return looked_into


def _folders_in(folder: Path, pattern: str) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if fnmatch.fnmatch(entry.name, pattern) and entry.is_dir()]
    except OSError:  # `glob` passes it over, too
        return []
    return [folder / name for name in names if pattern.startswith(".") or not name.startswith(".")]


# --- Ports -----------------------------------------------------------------------------------------------------------


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port of `host` that nobody listens on now; another program may take it before it is used."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])

"""Files of sealed records: one JSON object per line, each with a checksum over everything else in it.

A line that was edited or cut off is found out and named, and the lines around it stay good. Several processes may
write to one file: each holds a lock on it while it does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from rm_scale.errors import UserError
from rm_scale.files import write_whole

Model = TypeVar("Model", bound=BaseModel)


class RecordError(UserError):
    """A record that can't be used: of another schema, edited, or no record."""


def checksum(content: dict[str, Any]) -> str:
    """Return the checksum of a record's content, whatever its layout; its own field is left out.

    Raises:
        ValueError: NaN or an infinity is among the numbers.
    """
    plain = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def is_sound(content: dict[str, Any]) -> bool:
    """Return whether the checksum in a record fits the rest of it."""
    try:
        return bool(content.get("checksum") == checksum(content))
    except ValueError:  # NaN, which no record holds
        return False


def validated(content: dict[str, Any], model: type[Model], place: str, again: str) -> Model:
    """Return a record whose schema is known to be right as its class, after checking its seal.

    Args:
        content: the parsed JSON.
        model: the class of such records.
        place: the file, and the line in it, for errors.
        again: what to run again, for errors: "the case".

    Raises:
        RecordError: the checksum does not fit, or a field is wrong.
    """
    if not is_sound(content):
        when = "measured" if again == "the case" else "written"
        raise RecordError(
            f"{place}: the checksum does not fit the content, so it was changed after it was {when}. "
            f"Fix: run {again} again; records are not edited."
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise RecordError(f"{place}: {field}: {first['msg']}. Fix: run {again} again.") from error


@dataclass(frozen=True)
class Entry:
    """What one line of a file, or a whole `.json` file, holds.

    Attributes:
        file: the file.
        line: its number, from 1; `None` for a whole file.
        content: the parsed JSON; `None` where it can't be parsed.
        problem: why it can't.
    """

    file: Path
    line: int | None
    content: Any
    problem: str = ""

    @property
    def name(self) -> str:
        """Name the place without its folder: `135m.jsonl line 3`."""
        return self.file.name + (f" line {self.line}" if self.line is not None else "")

    @property
    def place(self) -> str:
        """Name the place with its folder, for errors."""
        return f"{self.file}" + (f" line {self.line}" if self.line is not None else "")

    def parsed(self, again: str) -> Any:
        """Return the content.

        Raises:
            RecordError: there is none.
        """
        if self.problem:
            delete = f"delete line {self.line} and " if self.line is not None else ""
            raise RecordError(f"{self.place}: can't be read as JSON ({self.problem}). Fix: {delete}run {again} again.")
        return self.content


def read_entries(file: Path) -> list[Entry]:
    """Return the lines of a `.jsonl` file, empty ones left out, or the one object of any other file."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        return [Entry(file, None, None, str(error))]
    if file.suffix != ".jsonl":
        return [_entry(file, None, raw, "")]
    lines = raw.split(b"\n")
    whole = len(lines) - 1  # What stands behind the last line end was cut off while it was written.
    return [
        _entry(file, number, line, "cut off while it was written: " if number > whole else "")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _entry(file: Path, line: int | None, raw: bytes, cause: str) -> Entry:
    try:
        return Entry(file, line, json.loads(raw.decode("utf-8")))
    except ValueError as error:
        return Entry(file, line, None, f"{cause}{error}")


def put_line(file: Path, content: dict[str, Any], is_same: Callable[[dict[str, Any]], bool]) -> None:
    """Add a record to a file in the place of an older one of the same case, or at its end; flushed to the disk.

    Lines that can't be parsed are kept: whoever reads the file names them.

    Args:
        file: made, with its folder, where it is missing.
        content: the sealed record.
        is_same: whether an older record is of the same case.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    with _locked(file) as stream:
        old = stream.read()
        lines = [part + b"\n" for part in old.split(b"\n") if part.strip()]
        places = [number for number, part in enumerate(lines) if _matches(part, is_same)]
        if not places:
            stream.write((b"" if not old or old.endswith(b"\n") else b"\n") + line)
            stream.flush()
            os.fsync(stream.fileno())
            return
        kept = [part for number, part in enumerate(lines) if number not in places[1:]]
        kept[places[0]] = line
        write_whole(file, b"".join(kept).decode("utf-8", errors="replace"), durable=True)


def _matches(line: bytes, is_same: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        content = json.loads(line)
    except ValueError:
        return False
    return isinstance(content, dict) and is_same(content)


@contextmanager
def _locked(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading and appending while no other process writes to it."""
    while True:
        with file.open("a+b") as stream:
            with suppress(OSError):  # some cluster file systems have no locks; a measurement is not lost over that
                fcntl.flock(stream, fcntl.LOCK_EX)
            # Another process may have put a new file in its place while this one waited for the old file's lock.
            if file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                stream.seek(0)
                yield stream
                return

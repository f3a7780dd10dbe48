"""Records that a full or failing disk may refuse for a while: they wait in memory, and no run ends for the lack of one.

Standard library only: commands that must start at once may use it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rm_scale.files import write_whole
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)

MOST_WAITING = 10_000
"""Lines of one file that wait in memory; beyond it the oldest are lost."""


class Record(Protocol):
    """A file of records whose content may still wait for the disk."""

    path: Path

    @property
    def num_waiting(self) -> int:
        """How many lines or values are not on the disk yet."""
        ...

    def write_waiting(self) -> bool:
        """Write what waits; return whether nothing waits any more."""
        ...


class RecordFile:
    """Append JSON lines to a file that this process alone writes; what can't be written is written later, in order.

    No error of the system is raised. A line that the disk took a part of is taken back and written whole later. Said as
    a warning: once when writing begins to fail, and once, with the number of lines kept and lost, when it works again.

    Args:
        path: the file; file and folder are made when they are missing.
        most_waiting: lines that are kept in memory.
    """

    def __init__(self, path: str | Path, most_waiting: int = MOST_WAITING) -> None:
        self.path = Path(path)
        self._most_waiting = most_waiting
        self._waiting: deque[bytes] = deque()
        self._num_kept = 0  # lines that could not be written when they came, and were later
        self._num_lost = 0
        self._fails = False
        self._sound_size: int | None = None  # where a write that failed began

    @property
    def num_waiting(self) -> int:
        """How many lines are not on the disk yet."""
        return len(self._waiting)

    def append(self, record: Mapping[str, Any]) -> bool:
        """Add one JSON object as a line of its own; return whether it is on the disk, as far as the system says."""
        is_free = self.write_waiting()
        self._waiting.append(json.dumps(record).encode() + b"\n")
        if len(self._waiting) > self._most_waiting:
            self._waiting.popleft()
            self._num_lost += 1
        return is_free and self.write_waiting()

    def write_waiting(self) -> bool:
        """Write the lines that wait; return whether none waits any more."""
        if not self._waiting:
            return True
        try:
            self._write_lines()
        except OSError as error:
            if not self._fails:
                self._fails = True  # before it is said: the warning may itself be a record that waits here
                logger.warning(
                    f"{self.path}: can't be written ({one_line(error, 160)}). The run goes on; up to "
                    f"{self._most_waiting:,} lines are kept in memory until the disk takes them. Fix: free disk space."
                )
            return False
        self._say_it_works()
        return True

    def _write_lines(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(self._waiting)
        with contextlib.closing(_Appending(self.path, self._sound_size)) as file:
            self._sound_size = file.size
            for line in lines:
                file.write(line)
        # Only now: some file systems refuse what was written when the file is closed.
        self._sound_size = None
        for _ in lines:
            self._waiting.popleft()
        self._num_kept += len(lines) if self._fails else 0

    def _say_it_works(self) -> None:
        if not self._fails:
            return
        kept, lost = self._num_kept, self._num_lost
        self._fails, self._num_kept, self._num_lost = False, 0, 0
        text = f"{self.path}: can be written again; {kept:,} lines that waited in memory are in it now"
        logger.warning(f"{text}, {lost:,} older ones are lost" if lost else f"{text}, none is lost")


class _Appending:
    """A file that is open to append whole lines, first cut back to what was sound before a write that failed.

    Args:
        path: the file.
        sound_size: its size before that write; `None` when none has failed.

    Attributes:
        size: of the file as it is sound now.
    """

    def __init__(self, path: Path, sound_size: int | None) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self.size = os.fstat(self._handle).st_size
            if sound_size is not None and self.size > sound_size:
                os.ftruncate(self._handle, sound_size)
                self.size = sound_size
            # What a killed process left of its last line is ended first: only that line is lost.
            self._starts_anew = self.size > 0 and os.pread(self._handle, 1, self.size - 1) != b"\n"
        except OSError:
            os.close(self._handle)
            raise

    def write(self, line: bytes) -> None:
        """Write a line; when the disk takes a part of it only, cut the file back to the lines before all of these."""
        rest = memoryview(b"\n" + line if self._starts_anew else line)
        self._starts_anew = False
        try:
            while rest:
                rest = rest[os.write(self._handle, rest) :]  # after a part, the next call raises what is wrong
        except OSError:
            with contextlib.suppress(OSError):  # readers should not meet a part meanwhile; it is cut later otherwise
                os.ftruncate(self._handle, self.size)
            raise

    def close(self) -> None:
        """Close it, and raise what the file system has found out only now."""
        os.close(self._handle)


class WholeRecord:
    """A file that is always written whole. What the disk refuses is tried again later; no error is raised.

    Args:
        path: the file; its folder is made when it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._text: str | None = None
        self._fails = False

    @property
    def num_waiting(self) -> int:
        """1 when the last text is not on the disk yet, else 0."""
        return 0 if self._text is None else 1

    def write(self, text: str) -> bool:
        """Write a text in place of the one before; return whether it is on the disk."""
        self._text = text
        return self.write_waiting()

    def write_waiting(self) -> bool:
        """Write the last text unless that is done; return whether it is."""
        if self._text is None:
            return True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, self._text)
        except OSError as error:
            if not self._fails:
                self._fails = True
                logger.warning(
                    f"{self.path}: can't be written ({one_line(error, 160)}). The run goes on, and it is written when "
                    "the disk takes it. Fix: free disk space."
                )
            return False
        self._text = None
        if self._fails:
            self._fails = False
            logger.warning(f"{self.path}: can be written again, and is whole")
        return True


def write_waiting(owners: Iterable[object]) -> list[Record]:
    """Write what waits in the `records` of these objects, callbacks for instance; return where something still does.

    Objects without records are passed over.
    """
    records: list[Record] = [record for owner in owners for record in getattr(owner, "records", ())]
    return [record for record in records if not record.write_waiting()]

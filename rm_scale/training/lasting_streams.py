"""Standard output and error of a training process that outlive a full disk, a broken pipe and a reader that is stuck.

Standard library only, since it is used before anything else is imported.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import sys
from typing import Any

PATIENCE_SECONDS = 30.0
"""How long a pipe whose reader does not read is waited for, once; after that only until it takes something again."""


class _LossyFile(io.RawIOBase):
    """Write to a handle of the system; what it refuses is dropped and counted, and no error is raised.

    Args:
        handle: the handle, which stays open when this is closed.
        name: of the stream.
        speaker: who says it when lines were lost, such as "rm_scale rank 0".
    """

    def __init__(self, handle: int, name: str, speaker: str) -> None:
        self.name = name
        self.mode = "wb"
        self._handle = handle
        self._speaker = speaker
        self._num_lost = 0
        self._reason = ""
        self._ends_in_line = False  # the last byte that was written ends no line
        self._lost_in_line = False  # the last byte that was lost ends no line
        self._written = 0
        self._patience = PATIENCE_SECONDS
        self._is_stuck = False
        self._pipe: tuple[tuple[int, int], int] | None = None

    def fileno(self) -> int:
        return self._handle

    def isatty(self) -> bool:
        return os.isatty(self._handle)

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        """Write bytes, or drop what is left of them; return their number all the same."""
        rest = memoryview(content).cast("B")
        size = len(rest)
        if self._lost_in_line:  # its beginning is lost already
            end = bytes(rest).find(b"\n") + 1
            if not end:
                return size
            self._num_lost, self._lost_in_line, rest = self._num_lost + 1, False, rest[end:]
        if rest and self.say_what_was_lost():
            try:
                self._write_all(rest)
            except OSError as error:
                self._note_lost(bytes(rest[self._written :]), error)
        elif rest:
            self._note_lost(bytes(rest))
        return size

    def say_what_was_lost(self) -> bool:
        """Write how many lines were lost, if any were; return whether the handle takes anything at present."""
        if not self._num_lost:
            return True
        what = "line" if self._num_lost == 1 else "lines"
        text = f"[{self._speaker}] WARNING {self._num_lost:,} {what} of this log could not be written and "
        text += f"{'is' if self._num_lost == 1 else 'are'} lost: {self._reason}\n"
        try:
            self._write_all(memoryview(("\n" if self._ends_in_line else "").encode() + text.encode()))
        except OSError:
            return False
        self._num_lost = 0
        return True

    def _note_lost(self, lost: bytes, error: OSError | None = None) -> None:
        """Count the lines of what was dropped. One that is cut is counted when its end comes, or right now if here."""
        self._num_lost += lost.count(b"\n")
        self._lost_in_line = not lost.endswith(b"\n")
        if error is not None:
            self._reason = error.strerror or type(error).__name__

    def _write_all(self, rest: memoryview) -> None:
        """Write all bytes. `_written` counts those that were, also when an error is raised."""
        self._written = 0
        while rest:
            count = self._write_some(rest)
            self._ends_in_line = rest[count - 1] != ord("\n")
            self._written += count
            rest = rest[count:]

    def _write_some(self, rest: memoryview) -> int:
        handle = self._handle_of_a_pipe()
        if handle is None:
            return os.write(self._handle, rest)
        if handle == self._handle:  # it may block: so no more than a pipe takes at once when it takes anything
            rest = rest[: select.PIPE_BUF]
            self._wait_for_room(handle)
        while True:
            try:
                count = os.write(handle, rest)
            except BlockingIOError:
                self._wait_for_room(handle)
            else:
                self._is_stuck = False
                return count

    def _wait_for_room(self, handle: int) -> None:
        """Wait until a pipe takes something.

        Raises:
            OSError: its reader does not read.
        """
        ready = select.poll()
        ready.register(handle, select.POLLOUT)
        if not ready.poll(0 if self._is_stuck else 1000 * self._patience):
            self._is_stuck = True
            raise OSError(errno.EAGAIN, "whatever reads it has stopped reading")

    def _handle_of_a_pipe(self) -> int | None:
        """Return where to write when this is a pipe: a handle of our own that doesn't block, if that can be had.

        To let the given handle not block would change it for all processes that have it.
        """
        found = os.fstat(self._handle)
        if not stat.S_ISFIFO(found.st_mode):
            return None
        place = (found.st_dev, found.st_ino)  # a library may have put something else in its place
        if self._pipe is not None and self._pipe[0] != place:
            os.close(self._pipe[1])
            self._pipe = None
        if self._pipe is None:
            try:
                own = os.open(f"/proc/self/fd/{self._handle}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:  # not Linux, or another user has made the pipe
                return self._handle
            self._pipe = (place, own)
        return self._pipe[1]


class _LastingStream(io.TextIOWrapper):
    """A text stream like the interpreter's own, over a `_LossyFile`."""

    def __init__(self, lossy: _LossyFile, stream: io.TextIOWrapper) -> None:
        self._lossy = lossy
        super().__init__(
            # Without a buffer where the interpreter was told to use none (PYTHONUNBUFFERED).
            lossy if stream.write_through else io.BufferedWriter(lossy),
            encoding=stream.encoding,
            errors=stream.errors,
            newline="\n",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self.__dict__["mode"] = "w"  # as the interpreter does with its own

    def flush(self) -> None:
        super().flush()
        with contextlib.suppress(OSError):
            self._lossy.say_what_was_lost()


def outlast_full_disks() -> None:
    """Put streams in place of standard output and error that never raise, nor wait for ever for a reader that is stuck.

    What can't be written is lost, and its lines are counted; the log says so as soon as it can be written again. For
    processes that train: a command such as `rm-scale data | head` should end when nobody reads any more.
    """
    speaker = f"rm_scale rank {os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0}"
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Something else is there in a notebook or under a test runner, and nothing at all where it was closed.
        if type(stream) is not io.TextIOWrapper or stream is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        with contextlib.suppress(OSError, ValueError):
            lasting = _LastingStream(_LossyFile(stream.fileno(), stream.name, speaker), stream)
            setattr(sys, name, lasting)
            setattr(sys, f"__{name}__", lasting)

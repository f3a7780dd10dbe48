"""What ranks print, copied to their logs so that no disk can hold a rank up.

A rank that writes to a file itself ends when the disk is full, and hangs when a network disk does. So it writes to a
pipe. One thread per rank empties the pipe, whatever happens; one thread per destination writes, waits where it can't,
and says how much was lost once it can again. Standard library only: it starts on every node of a job.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

MOST_WAITING_BYTES = 1 << 20
"""What one destination may owe; of what comes then, no more than a count is kept."""

RETRY_SECONDS = 2.0
"""Time between two tries to write to a disk that refuses."""

LAST_WORDS_SECONDS = 10.0
"""How long a rank's last words are waited for, and then their way to the disk: something may keep the pipe open."""

_BLOCK_BYTES = 65536
_LAST_BYTES = 4096


class Destination:
    """A file that may refuse for a while: bytes for it wait in memory, and some may be lost.

    Args:
        name: for messages.
        open_file: returns a file descriptor to write to; called again after an error.
        say: what to do with a message. It must not wait.
    """

    def __init__(self, name: str, open_file: Callable[[], int], say: Callable[[str], None]) -> None:
        self.name = name
        self._open = open_file
        self._say = say
        self._waiting: deque[bytes] = deque()
        self._num_bytes = 0
        self._lost_bytes = self._lost_lines = 0
        self._lost_since = ""
        self._changed = threading.Condition()
        self._is_closing = self._is_writing = False
        self._thread = threading.Thread(target=self._write_all, name=name, daemon=True)

    def begin(self) -> None:
        """Start writing."""
        self._thread.start()

    def add(self, block: bytes) -> None:
        """Take a block to write, or count it as lost. Never wait."""
        with self._changed:
            if self._num_bytes + len(block) > MOST_WAITING_BYTES:
                self._lost_since = self._lost_since or _clock()
                self._lost_bytes += len(block)
                self._lost_lines += block.count(b"\n")
            else:
                self._tell_loss()
                self._put(block)
            self._changed.notify_all()

    def _put(self, block: bytes) -> None:
        self._waiting.append(block)
        self._num_bytes += len(block)

    def _tell_loss(self) -> None:
        """Let the place in the file where lines are missing say so."""
        if self._lost_bytes:
            text = f"about {self._lost_lines:,} lines ({self._lost_bytes:,} bytes) were lost here"
            self._put(f"\nrm_scale: {text}, {self._lost_since} to {_clock()}: they could not be written\n".encode())
            self._lost_bytes = self._lost_lines = 0
            self._lost_since = ""

    def drain(self, seconds: float) -> bool:
        """Wait until all is written, at most so long; return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._is_writing, timeout=seconds)

    def close(self, seconds: float) -> bool:
        """Write what is left, for at most so long; return whether all was written."""
        with self._changed:
            self._tell_loss()
            self._is_closing = True
            self._changed.notify_all()
        return self.drain(seconds)

    # --- The writing thread ------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        file: int | None = None
        refused = False
        while (block := self._next()) is not None:
            rest = memoryview(block)
            while rest:
                try:
                    file = self._open() if file is None else file
                    rest = rest[os.write(file, rest) :]
                except OSError as error:
                    if not refused:
                        refused = True
                        self._say(
                            f"{self.name} can't be written ({error.strerror}); the run goes on, and up to "
                            f"{MOST_WAITING_BYTES:,} bytes wait in memory. Fix: make room on that disk."
                        )
                    _close(file)  # of a network disk a file may be stale, and a new one is not
                    file = None
                    time.sleep(RETRY_SECONDS)
                    continue
                if refused:
                    refused = False
                    self._say(f"{self.name} can be written again")
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if not self._waiting:
                return None
            block = self._waiting.popleft()
            self._num_bytes -= len(block)
            self._is_writing = True
            return block


def _close(file: int | None) -> None:
    if file is not None and file > 2:
        with contextlib.suppress(OSError):
            os.close(file)


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def log_file(path: Path, say: Callable[[str], None]) -> Destination:
    """Return a log as a destination; it is appended to."""
    return Destination(str(path), lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), say)


def standard_output(say: Callable[[str], None]) -> Destination:
    """Return this process's standard output, by which rank 0's lines reach the job's log."""
    return Destination("the job's own log", lambda: 1, say)


def standard_error() -> Destination:
    """Return this process's standard error: where it refuses, nobody can be told."""
    return Destination("standard error", lambda: 2, lambda text: None)


class RankOutput:
    """One rank's pipe, emptied as fast as it fills.

    Args:
        pipe: the reading end.
        destinations: each gets all of it.
    """

    def __init__(self, pipe: int, destinations: Sequence[Destination]) -> None:
        self._pipe = pipe
        self._last = b""
        self.destinations = tuple(destinations)
        self._ended = threading.Event()  # of the rank; something else may keep the pipe open
        self._thread = threading.Thread(target=self._read_all, daemon=True)

    def begin(self) -> None:
        """Start to read and write; after all ranks were started, since a process with threads should not fork."""
        for destination in self.destinations:
            destination.begin()
        self._thread.start()

    def _read_all(self) -> None:
        while True:
            ready, _, _ = select.select([self._pipe], [], [], 0.2)
            if not ready:
                if self._ended.is_set():
                    return  # a process that the rank has started holds the pipe, and has nothing to say
                continue
            try:
                block = os.read(self._pipe, _BLOCK_BYTES)
            except OSError:
                return
            if not block:
                return
            self._last = (self._last + block)[-_LAST_BYTES:]
            for destination in self.destinations:
                destination.add(block)

    def end(self) -> None:
        """Note that the rank has ended: what is still in the pipe is read, and nothing after that is waited for."""
        self._ended.set()

    def last_words(self, num_lines: int, seconds: float = LAST_WORDS_SECONDS) -> list[str]:
        """Return the last lines of a rank that has ended, whether or not they could be written."""
        self.end()
        self._thread.join(seconds)
        return self._last.decode(errors="replace").splitlines()[-num_lines:]

    def drain(self, seconds: float) -> None:
        """Wait until what a rank that has ended said last is read and written; at most so long."""
        end = time.monotonic() + seconds
        self.end()
        self._thread.join(seconds)
        for destination in self.destinations:
            destination.drain(max(0.0, end - time.monotonic()))

    def close(self, seconds: float) -> list[str]:
        """Write what is left; return the destinations that did not take all of it in time."""
        end = time.monotonic() + seconds
        self.end()
        self._thread.join(max(0.0, seconds))
        return [place.name for place in self.destinations if not place.close(max(0.0, end - time.monotonic()))]

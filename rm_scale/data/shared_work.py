"""Share the chunks of a source among processes: this one's workers, and other ranks and runs that need the same entry.

Whoever needs the entry takes a free chunk, by a lock on a file, until none is left, and then waits for the others'. The
operating system frees the lock of a process that dies, and somebody else takes its chunk.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from rm_scale.errors import DataError
from rm_scale.logs import get_logger

logger = get_logger(__name__)

_LOOK_AGAIN_SECONDS = 0.2
_LOG_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1
LOCKS = "locks"


@dataclass(frozen=True)
class ChunkWork:
    """The chunks of one cache entry that are to be made.

    Attributes:
        folder: the entry's.
        name: of the source, for messages.
        count: number of chunks.
        make: writes the files of a chunk, by its number, to an empty folder.
        is_complete: tells whether the whole entry is complete: its parts may be gone then.
    """

    folder: Path
    name: str
    count: int
    make: Callable[[int, Path], None] = field(repr=False)
    is_complete: Callable[[], bool] = field(repr=False)

    def chunk(self, number: int) -> Path:
        """Return the folder of a chunk, which is there when the chunk is complete."""
        return chunk_folder(self.folder, number)

    def missing(self) -> list[int]:
        """Return the numbers of the chunks that are not there."""
        if self.is_complete():
            return []
        there = set(os.listdir(self.folder))
        return [number for number in range(self.count) if self.chunk(number).name not in there]

    def take(self, number: int) -> bool:
        """Make a chunk, unless another process is at it or has made it; return whether it was made here."""
        with _free(self.folder / LOCKS / f"{number}.lock") as is_free:
            if not is_free or self.is_complete() or self.chunk(number).is_dir():
                return False
            self._make(number)
            return True

    def _make(self, number: int) -> None:
        whole = self.chunk(number)
        self._remove_leftovers(whole)
        aside = whole.with_name(f"{whole.name}.tmp-{socket.gethostname()}-{os.getpid()}")
        aside.mkdir()
        try:
            self.make(number, aside)
            aside.rename(whole)
        except OSError:
            # Some network file systems don't lock across nodes, so another node may have made the same chunk.
            if not (whole.is_dir() or self.is_complete()):
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _remove_leftovers(self, whole: Path) -> None:
        """Remove what processes of this machine that are gone have left of a chunk."""
        for left in self.folder.glob(f"{whole.name}.tmp-{socket.gethostname()}-*"):
            number = left.name.rpartition("-")[2]
            if number.isdigit() and not Path(f"/proc/{number}").exists():
                shutil.rmtree(left, ignore_errors=True)

    def take_all(self, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Make chunks until none is free."""
        while goes_on() and any(self.take(number) for number in self.missing()):
            pass


def chunk_folder(folder: Path, number: int) -> Path:
    """Return the folder of a chunk of an entry."""
    return folder / f"chunk-{number:05d}"


def make_all(work: ChunkWork, num_processes: int) -> None:
    """Return when all chunks are there, made by worker processes, by this one, or by others that do the same.

    Args:
        work: what to make.
        num_processes: of this process; with 1 it makes them itself.

    Raises:
        DataError: a worker was killed, or a row stops the run.
    """
    progress = _Progress(work)
    workers = min(num_processes, len(work.missing()))
    if workers > 1:
        _work_in_processes(work, workers, progress)
    while work.missing():
        if not any(work.take(number) and progress.tell() for number in work.missing()):
            time.sleep(_LOOK_AGAIN_SECONDS)
            progress.tell(waits=True)


class _Progress:
    """A log line a minute."""

    def __init__(self, work: ChunkWork) -> None:
        self._work = work
        self._began = self._told = time.monotonic()
        self._missing = len(work.missing())

    def tell(self, waits: bool = False) -> bool:
        """Log how far it is, if the last line is old; return True."""
        now = time.monotonic()
        if now - self._told < _LOG_SECONDS:
            return True
        self._told = now
        work, missing = self._work, len(self._work.missing())
        made = self._missing - missing
        left = f", about {(now - self._began) * missing / made / 60:.0f} min left" if made > 0 else ""
        what = "waiting for other processes that are encoding it" if waits else "encoding"
        logger.info(f"{work.name}: {what}, {work.count - missing:,} of {work.count:,} parts are there{left}")
        return True


@contextlib.contextmanager
def _free(path: Path) -> Iterator[bool]:
    """Hold a lock during the block if nobody else does; yield whether it is held."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


# --- Worker processes ----------------------------------------------------------------------------------------------


def _work_in_processes(work: ChunkWork, count: int, progress: _Progress) -> None:
    """Let worker processes make chunks until none is free.

    They are forked: started in a moment, without asking that the main program can be imported again. They compute on
    nothing but text and arrays, in one thread each.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, Any] = {}
    with _tokenizers_in_one_thread():
        for _ in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(work, sender, os.getpid()), daemon=True)
            process.start()
            sender.close()
            running[receiver] = process
    try:
        while running:
            for ended in wait(list(running), timeout=1.0):
                receiver = cast(Connection, ended)
                _raise_failure(work, receiver, running[receiver])
                del running[receiver]
            progress.tell()
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _raise_failure(work: ChunkWork, receiver: Connection, process: Any) -> None:
    """Raise what a worker that has ended met.

    Raises:
        DataError: it was killed.
        Exception: what it raised.
    """
    try:
        failure = receiver.recv()
    except EOFError:
        process.join()
        how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        raise DataError(
            f"{work.name}: a process that encoded it ended with {how}: killed, perhaps for want of memory. "
            "Fix: --dataset_num_proc with a smaller number; what is encoded is kept."
        ) from None
    process.join()
    if failure is not None:
        raise failure


def _worker(work: ChunkWork, sender: Connection, parent: int) -> None:
    _end_with(parent)
    try:
        work.take_all(lambda: os.getppid() == parent)
        sender.send(None)
    except Exception as error:
        sender.send(_sendable(error))


def _end_with(parent: int) -> None:
    """Let this process end when the one that started it does, and by nothing that is meant for that one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # not Linux; `take_all` looks between chunks then
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def _tokenizers_in_one_thread() -> Iterator[None]:
    """Let tokenizers of processes that are forked in the block use one thread: those of others are gone there."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def remove_locks(folder: Path, leftovers: Sequence[str] = ("chunk-*.tmp-*",)) -> None:
    """Remove from a complete entry what only the work on it needed."""
    shutil.rmtree(folder / LOCKS, ignore_errors=True)
    for pattern in leftovers:
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)

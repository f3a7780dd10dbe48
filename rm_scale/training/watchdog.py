"""A thread that watches the main one, to name the rank that keeps the others waiting, for ever or in every step.

When nothing has moved for `ddp_timeout`, every rank writes down where it stands and how many collectives each process
group has been given (`collective_progress`). The rank with fewer than the others is the one that did not reach the
collective; the stacks only tell a person where it stands. The processes then end instead of burning their hours.

Where a rank that waits for others blocks the host (gloo), the thread also looks ten times a second whether the main one
is inside a collective, or at work. From the shares follows who is slow.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rm_scale.files import write_whole
from rm_scale.logs import get_logger
from rm_scale.training import step_timing
from rm_scale.training.collective_progress import (
    GroupCount,
    count_collectives,
    since,
    waiting_blocks_the_host,
)
from rm_scale.training.hang_report import explain_hang

logger = get_logger(__name__)

EXIT_HUNG = 1

_SAMPLE_SECONDS = 0.1
_LEAST_SAMPLES = 15
_COLLECTIVE_FILES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")
_ZERO_FILES = f"deepspeed{os.sep}runtime{os.sep}zero{os.sep}"
_WRAPPER_FILE = f"deepspeed{os.sep}utils{os.sep}nvtx.py"
_BACKWARD_FILE = f"torch{os.sep}autograd{os.sep}graph.py"

# In small letters. gloo, the store and NCCL each say it in their own way; NCCL's last error comes with the system's.
_BROKEN = (
    "closed by peer",
    "closed by remote peer",
    "remote peer closed",
    "remote process exited",
    "connection reset",
    "connection refused",
    "connection timed out",
    "connection was likely closed",
    "no route to host",
    "broken pipe",
    "ncclremoteerror",
    "nccl communicator was aborted",
    "net/ib : got completion",
)
_TIMED_OUT = (
    "watchdog caught collective operation timeout",
    "timed out waiting",
    "wait timeout after",
    "socket timeout",
    "nccl timeout",
)


class Watchdog(threading.Thread):
    """The thread that watches this rank (see the module's text).

    Args:
        folder: the run's `run/` folder, where ranks leave where they stand.
        rank, world_size: of this process.
        timeout: seconds without progress, `ddp_timeout`.
        attempt: which attempt of the run; reports of earlier ones are not mixed up.
        is_training: whether the time now counts as training.
        note_end: writes the reason to `run/attempts.jsonl`.

    Attributes:
        knows_work: whether it can tell work from waiting for other ranks, once it has begun to watch.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        timeout: float,
        attempt: int,
        is_training: Callable[[], bool],
        note_end: Callable[[str], None],
    ) -> None:
        super().__init__(name="rm_scale-watchdog", daemon=True)
        self.folder = folder / f"hang-attempt{attempt}"
        self.rank, self.world_size = rank, world_size
        # A little before the collective's own timeout, whose error tells only that somebody was late. What is left
        # is the time in which the ranks tell each other where they stand.
        left = min(0.5 * timeout, max(5.0, 0.05 * timeout))
        self.limit = timeout - left
        # All ranks look at the shared folder: one of thousands of nodes must not do so ten times a second.
        self._look_seconds = max(1.0, world_size / 64)
        self.grace = max(2.0, min(0.6 * left, max(15.0, 2 * self._look_seconds)))
        self.is_training = is_training
        self.note_end = note_end
        self.step = 0
        self.place = "start"
        self.knows_work = False
        self._moved = time.monotonic()
        self._samples = {"work": 0, "collective": 0}
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._leaving = threading.Lock()
        self._counted_before: list[GroupCount] = []
        self._old_reports: set[tuple[str, int]] = set()
        self._looked = time.monotonic()

    def start(self) -> None:
        """Begin to watch; called by every rank at the same place of the program, from which collectives are counted."""
        self._counted_before = count_collectives()
        self._old_reports = set(self._reports())
        self.knows_work = waiting_blocks_the_host()
        super().start()

    def beat(self, place: str, step: int | None = None) -> None:
        """Note that the main thread has come this far, so that something moves."""
        self.place = place
        self.step = self.step if step is None else step
        self._moved = time.monotonic()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def work_share(self) -> float | None:
        """Return the share of time, since the last call, in which this rank did not wait for others; `None`: not known.

        It is not known after too short a time, and never under NCCL: there the GPU waits for the other ranks, and the
        host for its own GPU, which looks the same whether that computes or waits.
        """
        total = sum(self._samples.values())
        if total < _LEAST_SAMPLES:
            return None
        samples, self._samples = self._samples, {"work": 0, "collective": 0}
        # A rank that does its work between two looks has worked all the same: a share of zero can't be compared with.
        return max(samples["work"], 0.5) / total

    def run(self) -> None:
        """Look at the main thread and at the other ranks' reports, until stopped."""
        while not self._stopped.wait(_SAMPLE_SECONDS):
            if self.knows_work and self.is_training():
                state = where(self._main)["state"]
                if state in self._samples:
                    self._samples[state] += 1
            now = time.monotonic()
            if now - self._looked > self._look_seconds:
                self._looked = now
                if self._reports():
                    # Another rank is about to leave. This one may be the one it waits for, busy and within its limit.
                    self.report_and_leave(None)
            if now - self._moved > self.limit:
                self.report_and_leave(f"nothing has moved for {now - self._moved:.0f} s (ddp_timeout)")

    def report_and_leave(self, what: str | None) -> NoReturn:
        """Write down where this rank stands, wait for the others to do so, say who is missing, and end the process.

        Args:
            what: what was seen; `None` on a rank that saw nothing itself, but another's report.
        """
        with self._leaving:  # the main thread may come here with an error while this one watches; one is enough
            try:
                self._report(what)
                self._wait_for_reports()
                self._explain()
            except Exception as error:
                text = f"rm_scale: rank {self.rank}: {what}; who is missing can't be said: {error!r}"
                print(text, file=sys.stderr, flush=True)
            finally:
                os._exit(EXIT_HUNG)

    def _explain(self) -> None:
        """Say who is missing. One rank speaks for all; the others give it the time to do so."""
        names = sorted(name for name, _ in self._reports())
        if names[0] != self._report_name():
            time.sleep(2.0 + self._look_seconds)
            return
        reports = [json.loads((self.folder / name).read_text(encoding="utf-8")) for name in names]
        seen = next((report["what"] for report in reports if report["what"]), "a rank found something wrong")
        text = explain_hang(reports, self.world_size, seen)
        print(f"rm_scale: {text} Stacks of every rank: {self.folder}", file=sys.stderr, flush=True)
        self.note_end(text)

    def _report_name(self) -> str:
        return f"rank-{self.rank:05d}.json"

    def _reports(self) -> list[tuple[str, int]]:
        """Return name and time of each report that was not there when this rank began to watch."""
        found = []
        with contextlib.suppress(OSError):
            found = [(path.name, path.stat().st_mtime_ns) for path in self.folder.glob("rank-*.json")]
        return [report for report in found if report not in self._old_reports]

    def _wait_for_reports(self) -> None:
        """Wait until every rank has reported, at most `grace` seconds; the others are then called silent."""
        end = time.monotonic() + self.grace
        while time.monotonic() < end and len(self._reports()) < self.world_size:
            time.sleep(2 * _SAMPLE_SECONDS)

    def _report(self, what: str | None) -> None:
        mine = {"rank": self.rank, "step": self.step, "place": self.place, "what": what, **self._where()}
        counts: list[GroupCount] = []
        with contextlib.suppress(Exception):  # groups may go while they are read; the rest is worth having
            counts = since(count_collectives(), self._counted_before)
        try:
            self._write_report(mine | {"collectives": [asdict(count) for count in counts]})
        except OSError as error:
            self._tell_stacks(mine, error)
            raise

    def _where(self) -> dict[str, str]:
        """Return where the main thread is; when that thread itself asks after an error, where the error was raised."""
        error = sys.exc_info()[1]
        if threading.get_ident() != self._main or error is None:
            return where(self._main)
        last = traceback.extract_tb(error.__traceback__)[-1]
        return {"state": "collective", "at": f"{last.filename}:{last.lineno} ({last.name})"}

    def _tell_stacks(self, mine: dict[str, Any], error: OSError) -> None:
        """Say in the log where this rank stands, when its report can't be written."""
        text = f"rank {self.rank} stands at {mine['at']} in {mine['place']}, step {self.step}; its report can't be"
        print(f"rm_scale: {text} written in {self.folder}: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _write_report(self, mine: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{self.rank:05d}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write_whole(self.folder / self._report_name(), json.dumps(mine))


def where(thread: int | None) -> dict[str, str]:
    """Return where a thread is: `at`, its innermost line, and `state`.

    The state is collective, backward (which may hide a collective) or work.
    """
    frame = sys._current_frames().get(thread or -1)
    while frame is not None and frame.f_code.co_filename == step_timing.__file__:
        frame = frame.f_back  # the clock around a collective's wait is not where a rank stands
    if frame is None:
        return {"state": "work", "at": "unknown"}
    files: list[str] = []
    inner: FrameType | None = frame
    while inner is not None and len(files) < 8:
        files.append(inner.f_code.co_filename)
        inner = inner.f_back
    state = "work"
    if any(part in file for file in files for part in _COLLECTIVE_FILES) or _waits_in_zero(files):
        state = "collective"
    elif _BACKWARD_FILE in files[0]:
        state = "backward"
    last = traceback.extract_stack(frame, limit=1)[-1]
    return {"state": state, "at": f"{last.filename}:{last.lineno} ({last.name})"}


def _waits_in_zero(files: list[str]) -> bool:
    """Return whether the innermost frame is ZeRO's own: it computes nothing there, but waits for collectives."""
    return _ZERO_FILES in next((file for file in files if _WRAPPER_FILE not in file), "")


def collective_failure(error: BaseException) -> str | None:
    """Return what went wrong, if a collective raises this error when another rank is gone or late; else `None`."""
    text = str(error).lower()
    if not isinstance(error, RuntimeError):  # torch's DistBackendError, DistNetworkError and DistStoreError are
        return None
    if any(part in text for part in _TIMED_OUT):
        return "a collective timed out"
    return "the connection to another rank broke" if any(part in text for part in _BROKEN) else None

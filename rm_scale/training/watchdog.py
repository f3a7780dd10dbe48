"""A thread that watches the main one: it names the rank that keeps the others waiting, for ever or step after step.

Ten times a second it looks where the main thread is: inside a collective, or at work. From the shares follows who is
slow. When nothing has moved for `ddp_timeout`, every rank writes down where it stands; whoever is missing from the
collective that the others wait in is then known by name, and the process ends instead of burning its hours.
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
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rm_scale.logs import get_logger
from rm_scale.training import timing

logger = get_logger(__name__)

EXIT_HUNG = 1
SLOW_RATIO = 1.5
"""A rank is named when it works this many times as long per step as the median rank."""

_SAMPLE_SECONDS = 0.1
_LEAST_SAMPLES = 15
_COLLECTIVE_FILES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")
_ZERO_FILES = f"deepspeed{os.sep}runtime{os.sep}zero{os.sep}"
_WRAPPER_FILE = f"deepspeed{os.sep}utils{os.sep}nvtx.py"
_BACKWARD_FILE = f"torch{os.sep}autograd{os.sep}graph.py"


class Watchdog(threading.Thread):
    """See the module.

    Args:
        folder: the run's `run/` folder, where ranks leave where they stand.
        rank, world_size: of this process.
        timeout: seconds without progress, `ddp_timeout`.
        life: which life of the run; reports of earlier ones are not mixed up.
        is_training: whether the time now counts as training.
        note_end: writes the reason to `run/lives.jsonl`.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        timeout: float,
        life: int,
        is_training: Callable[[], bool],
        note_end: Callable[[str], None],
    ) -> None:
        super().__init__(name="rm_scale-watchdog", daemon=True)
        self.folder = folder / f"hang-life{life}"
        self.rank, self.world_size = rank, world_size
        # A little before the collective's own timeout, whose error tells only that somebody was late.
        self.limit = max(0.5 * timeout, timeout - max(5.0, 0.05 * timeout))
        self.grace = min(15.0, max(2.0, 0.1 * timeout))
        self.is_training = is_training
        self.note_end = note_end
        self.step = 0
        self.place = "start"
        self._moved = time.monotonic()
        self._samples = {"work": 0, "collective": 0}
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._has_reported = False
        self._looked = time.monotonic()
        # All ranks look at the shared folder: one of thousands of nodes must not do so ten times a second.
        self._look_seconds = max(1.0, world_size / 64)

    def beat(self, place: str, step: int | None = None) -> None:
        """The main thread has got here."""
        self.place = place
        self.step = self.step if step is None else step
        self._moved = time.monotonic()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def work_share(self) -> float | None:
        """Share of the time since the last share given that this rank did not wait for others; `None`: too short."""
        total = sum(self._samples.values())
        if total < _LEAST_SAMPLES:
            return None
        samples, self._samples = self._samples, {"work": 0, "collective": 0}
        return samples["work"] / total

    def run(self) -> None:
        """Look until stopped."""
        while not self._stopped.wait(_SAMPLE_SECONDS):
            if self.is_training():
                state = where(self._main)["state"]
                if state in self._samples:
                    self._samples[state] += 1
            now = time.monotonic()
            if now - self._looked > self._look_seconds:
                self._looked = now
                if self.folder.exists():
                    self._report()  # another rank has found something wrong, and wants to know who is still there
            if now - self._moved > self.limit:
                self.report_and_leave(f"nothing has moved for {now - self._moved:.0f} s (ddp_timeout)")

    def report_and_leave(self, what: str) -> NoReturn:
        """Write down where this rank stands, wait for the others to do so, say who is missing, and end the process.

        Args:
            what: what was seen.
        """
        self._report()
        time.sleep(self.grace)
        with contextlib.suppress(OSError, ValueError):
            reports = [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank-*.json"))]
            text = explain_hang(reports, self.world_size, what)
            # One speaks for all; the others give it the time to do so.
            if min(report["rank"] for report in reports) == self.rank:
                print(f"rm_scale: {text} Stacks of every rank: {self.folder}", file=sys.stderr, flush=True)
                self.note_end(text)
            else:
                time.sleep(2.0)
        os._exit(EXIT_HUNG)

    def _report(self) -> None:
        if self._has_reported:
            return
        self._has_reported = True
        mine = {"rank": self.rank, "step": self.step, "place": self.place, **where(self._main)}
        with contextlib.suppress(OSError):
            self._write_report(mine)

    def _write_report(self, mine: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{self.rank:05d}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        aside = self.folder / f".rank-{self.rank:05d}.json"
        aside.write_text(json.dumps(mine), encoding="utf-8")
        aside.rename(self.folder / f"rank-{self.rank:05d}.json")


def where(thread: int | None) -> dict[str, str]:
    """Where a thread is: `state` is collective, backward (which may hide one) or work; `at` is the innermost line."""
    frame = sys._current_frames().get(thread or -1)
    while frame is not None and frame.f_code.co_filename == timing.__file__:
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
    """Is the innermost frame ZeRO's own? It computes nothing there itself, but waits for handles of collectives."""
    return _ZERO_FILES in next((file for file in files if _WRAPPER_FILE not in file), "")


def is_broken_connection(error: BaseException) -> bool:
    """Is this what a collective raises when the process at the other end is gone?"""
    text = str(error)
    known = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")
    return isinstance(error, RuntimeError) and any(part in text for part in known)


def explain_hang(reports: list[dict[str, Any]], world_size: int, what: str) -> str:
    """Say which rank is missing and at which step, from where each rank says it stands.

    Args:
        reports: of the ranks that still answer.
        world_size: ranks of the run.
        what: what was seen.
    """
    step = min(report["step"] for report in reports)
    text = f"step {step}: {what}: "
    silent = sorted(set(range(world_size)) - {report["rank"] for report in reports})
    behind = [report for report in reports if report["state"] == "work"]
    waiting = [report for report in reports if report["state"] != "work"]
    if silent:
        text += f"rank {_listed(silent)} does not answer (dead, frozen, or its node is lost). "
    if behind and len(behind) < world_size:
        standing = "; ".join(f"rank {r['rank']} stands at {r['at']} in {r['place']}" for r in behind[:8])
        text += f"rank {_listed([r['rank'] for r in behind])} did not reach the collective: {standing}. "
    if not silent and not behind:
        places = sorted({f"{r['place']} at {r['at']}" for r in waiting})
        text += f"all ranks wait in a collective, at: {'; '.join(places[:4])}. "
    elif waiting:
        text += f"Rank {_listed([r['rank'] for r in waiting])} waited for it in {waiting[0]['place']}. "
    return f"{text}Fix: look at that rank's node and its stack; a longer wait is allowed by --ddp_timeout."


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown} and {len(ranks) - 16} more"


def slow_ranks(work_seconds: list[float], ratio: float = SLOW_RATIO) -> list[tuple[int, float]]:
    """Ranks that work much longer per step than the others, with how many times as long.

    Args:
        work_seconds: time of each rank not spent waiting for others, since the last look.
        ratio: to the median rank (of an even number, the faster of the two in the middle).
    """
    median = sorted(work_seconds)[(len(work_seconds) - 1) // 2]
    if median <= 0:
        return []
    return [(rank, seconds / median) for rank, seconds in enumerate(work_seconds) if seconds > ratio * median]

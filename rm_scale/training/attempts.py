"""The attempts of a run: each start, first step, save and end, one JSON object per line in `run/attempts.jsonl`.

A run that is preempted and started again has several attempts. `rm-scale slurm status` reads the file, and so does the
guard that ends a loop of restarts which make no progress. No torch here: both must work on a login node.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rm_scale.errors import TrainingError, UserError
from rm_scale.files import append_json_line, read_json_lines
from rm_scale.json_values import as_number, as_whole
from rm_scale.texts import one_line
from rm_scale.training.preemption import time_limit
from rm_scale.training.recorded_times import RecordedTimes, recorded_times
from rm_scale.training.records import RecordFile

FILE_NAME = "attempts.jsonl"

OLD_FILE_NAME = "lives.jsonl"
"""The name up to version 0.1, which called an attempt a life. Run directories that have it are still read."""

BEGAN = time.time()
"""When this was imported, which a training process does first of all."""

_NO_TIME = 253_402_300_800.0
"""Seconds at the end of the year 9999, from where on Python knows no date; no run has so many steps either."""

_KILLED = "it was killed without a word"

MAX_IDLE_ATTEMPTS = 3
"""After this many attempts in a row that start at the same step and save nothing beyond it, the next is refused."""


class Attempt:
    """This attempt of the run. Its events are appended to the record by rank 0; other ranks write nothing.

    Args:
        folder: the run's `run/` folder.
        is_main: this process writes.
        resume: the checkpoint this attempt goes on from, if any.
        step: of that checkpoint.

    Attributes:
        number: 1 for the first attempt of the run.
        outcome: why the attempt ended, where it did not finish and raised no error.
    """

    def __init__(self, folder: Path, is_main: bool, resume: Path | None = None, step: int = 0) -> None:
        self.path = folder / FILE_NAME
        self._file = RecordFile(self.path)
        self._speaks_for_another = False
        self.is_main = is_main
        self.resume = resume
        self.step = step
        self.outcome: str | None = None
        self.has_begun = False
        self.number = max((event.get("attempt", 0) for event in read_attempts(folder)), default=0) + 1

    def note(self, event: str, step: int | None = None, **facts: Any) -> None:
        """Write one event now, or when the disk takes it: for the lack of a record no healthy run may end."""
        self.step = self.step if step is None else step
        if not self.is_main:
            return
        record = {"event": event, "attempt": self.number, "time": time.time(), "step": self.step, **_job(), **facts}
        if self._speaks_for_another:
            with suppress(OSError):
                append_json_line(self.path, record)
        else:
            self._file.append(record)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Run the block as this attempt. If it has begun by then, its end is written, with `outcome` or the error."""
        try:
            yield
        except BaseException as error:
            text = one_line(error)[:300]
            self._note_end(text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")
            raise
        self._note_end(self.outcome or "finished")

    def begin(self) -> None:
        """Write `start`, once, with the time at which the process began and what the job has in all."""
        if not self.has_begun:
            self.has_begun = True
            limit = time_limit()
            facts: dict[str, Any] = {"limit_seconds": round(limit, 3)} if limit is not None else {}
            self.note("start", time=BEGAN, **facts)
            if self.is_main:
                _tell_starter()

    def end_for_all(self, reason: str) -> None:
        """Write the end from any rank: the one that speaks for all when the run can't go on."""
        self._speaks_for_another = not self.is_main  # rank 0 may write at the same moment
        self.is_main = True
        self.note("end", reason=reason)

    def _note_end(self, reason: str) -> None:
        if self.has_begun:
            self.note("end", reason=reason)


def _tell_starter() -> None:
    """Make the file by which who starts jobs anew knows that the guard below counts this attempt, if it named one."""
    if path := os.environ.get("RM_SCALE_BEGUN_FILE"):
        with suppress(OSError):
            Path(path).touch()


def _job() -> dict[str, Any]:
    """Return the Slurm job, its restarts and its nodes; without Slurm, this machine's name."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")  # a run without Slurm's own starter does not check it
    return {
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart_count": int(restarts) if restarts.isascii() and restarts.isdigit() else 0,
        "nodes": os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or platform.node(),
    }


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """Return all events of a run, oldest first; none when nothing was recorded.

    Each has `event`, a text; where `attempt`, `step` (whole numbers) and `time` (Unix seconds) are there, they are
    numbers: what a damaged line has of another type is left out.

    Args:
        folder: the run's `run/` folder. What an older version has recorded there comes first.
    """
    events = [*read_json_lines(folder / OLD_FILE_NAME), *read_json_lines(folder / FILE_NAME)]
    return [found for event in events if isinstance((found := _sound(event)).get("event"), str)]


def _sound(event: dict[str, Any]) -> dict[str, Any]:
    found = {("attempt" if name == "life" else name): value for name, value in event.items()}
    numbers: dict[str, float | None] = {name: as_whole(found.pop(name, None)) for name in ("attempt", "step")}
    numbers["time"] = as_number(found.pop("time", None))
    return found | {name: value for name, value in numbers.items() if value is not None and 0 <= value < _NO_TIME}


def refuse_idle_restart(folder: Path, start_step: int) -> None:
    """End a loop of restarts: the last attempts began where this one would, and none saved anything beyond it.

    Args:
        folder: the run's `run/` folder.
        start_step: the step this attempt would start from.

    Raises:
        TrainingError: the last `MAX_IDLE_ATTEMPTS` attempts made no progress.
    """
    attempts: dict[int, list[dict[str, Any]]] = {}
    events = read_attempts(folder)
    for event in events:
        if "attempt" in event:
            attempts.setdefault(event["attempt"], []).append(event)
    idle: list[str] = []
    for number in sorted(attempts, reverse=True):
        if _last_saved_step(attempts[number]) > start_step or _first_step(attempts[number]) != start_step:
            break
        idle.append(_reason(attempts[number]))
    if len(idle) >= MAX_IDLE_ATTEMPTS:
        is_of_time = idle[0] == _KILLED or idle[0].startswith("stopped: ")
        times = recorded_times(events) if is_of_time else RecordedTimes()
        cause = "too few minutes between save_steps, a broken row, not enough memory"
        if times.are_too_long:
            cause = "ask for more time, or make start-up, steps or saves faster"
        raise TrainingError(
            f"resume_from_checkpoint=auto: the last {len(idle)} attempts of this run started at step {start_step} and "
            f"saved nothing beyond it (the last one: {idle[0]}). Another would most likely do the same. "
            f"{times.text()}Fix: look at {folder / FILE_NAME} and the log, and mend the "
            f"cause ({cause}), then start once with --force idle_restarts."
        )


def _first_step(events: list[dict[str, Any]]) -> int:
    """Return the step that an attempt started from, -1 when its start is not on record."""
    return next((event.get("step", -1) for event in events if event["event"] == "start"), -1)


def _last_saved_step(events: list[dict[str, Any]]) -> int:
    """Return the step of an attempt's last checkpoint, -1 without one; beyond all steps for one that finished."""
    if any(event["event"] == "end" and event.get("reason") == "finished" for event in events):
        return 2**62
    return max((event.get("step", -1) for event in events if event["event"] == "saved"), default=-1)


def _reason(events: list[dict[str, Any]]) -> str:
    ends = [str(event.get("reason")) for event in events if event["event"] == "end"]
    return ends[-1] if ends else _KILLED

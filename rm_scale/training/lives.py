"""The lives of a run: each start, first step, save and end, one JSON object per line in `run/lives.jsonl`.

A run that is preempted and started again has several. `rm-scale slurm status` reads the file, and so does the guard
that ends a loop of restarts which make no progress. No torch here: both must work on a login node.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rm_scale.errors import TrainingError, UserError

FILE_NAME = "lives.jsonl"

BEGAN = time.time()
"""When this was imported, which a training process does first of all."""

MAX_IDLE_LIVES = 3
"""So many lives in a row that start at the same step and save nothing beyond it, and the next is refused."""


class Lives:
    """Append events of this life; on every rank but the first, do nothing.

    Args:
        folder: the run's `run/` folder.
        is_main: this process writes.
        resume: the checkpoint this life goes on from, if any.
        step: of that checkpoint.
    """

    def __init__(self, folder: Path, is_main: bool, resume: Path | None = None, step: int = 0) -> None:
        self.path = folder / FILE_NAME
        self.is_main = is_main
        self.resume = resume
        self.step = step
        self.outcome: str | None = None
        self.has_begun = False
        self.life = max((event.get("life", 0) for event in read_lives(folder)), default=0) + 1

    def note(self, event: str, step: int | None = None, **facts: Any) -> None:
        """Write one event now. A full disk must not end a healthy run, so a failure is passed over."""
        self.step = self.step if step is None else step
        if not self.is_main:
            return
        record = {"event": event, "life": self.life, "time": time.time(), "step": self.step, **_job(), **facts}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError:
            pass

    @contextmanager
    def lived(self) -> Iterator[None]:
        """Run the block as this life; once it has begun, its end is written with `outcome` or the error."""
        try:
            yield
        except BaseException as error:
            text = " ".join(str(error).split())[:300]
            self._note_end(text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")
            raise
        self._note_end(self.outcome or "finished")

    def begin(self) -> None:
        """Write `start`, once, with the time at which the process began."""
        if not self.has_begun:
            self.has_begun = True
            self.note("start", time=BEGAN)

    def _note_end(self, reason: str) -> None:
        if self.has_begun:
            self.note("end", reason=reason)


def _job() -> dict[str, Any]:
    """Where this life runs, as far as Slurm says."""
    return {
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "nodes": os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or platform.node(),
    }


def read_lives(folder: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; a line that a killed process left half-written is passed over."""
    try:
        lines = (folder / FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def refuse_idle_restart(folder: Path, start_step: int) -> None:
    """End a loop of restarts: the last lives began where this one would, and none saved anything beyond it.

    Args:
        folder: the run's `run/` folder.
        start_step: the step this life would start from.

    Raises:
        TrainingError: the last `MAX_IDLE_LIVES` lives made no progress.
    """
    lives: dict[int, list[dict[str, Any]]] = {}
    for event in read_lives(folder):
        lives.setdefault(event.get("life", 0), []).append(event)
    idle: list[str] = []
    for number in sorted(lives, reverse=True):
        if _reached(lives[number]) > start_step or _started(lives[number]) != start_step:
            break
        idle.append(_reason(lives[number]))
    if len(idle) >= MAX_IDLE_LIVES:
        raise TrainingError(
            f"resume_from_checkpoint=auto: the last {len(idle)} lives of this run started at step {start_step} and "
            f"saved nothing beyond it (the last one: {idle[0]}). Another would most likely do the same. "
            f"Fix: look at {folder / FILE_NAME} and the log, and mend the cause (too few minutes between save_steps, a "
            "broken row, not enough memory), then start once with --force idle_restarts."
        )


def _started(events: list[dict[str, Any]]) -> int:
    return next((int(event["step"]) for event in events if event["event"] == "start"), -1)


def _reached(events: list[dict[str, Any]]) -> int:
    """The last step a life has put on disk; a life that finished has all of them."""
    if any(event["event"] == "end" and event.get("reason") == "finished" for event in events):
        return 2**62
    return max((int(event["step"]) for event in events if event["event"] == "saved"), default=-1)


def _reason(events: list[dict[str, Any]]) -> str:
    ends = [str(event.get("reason")) for event in events if event["event"] == "end"]
    return ends[-1] if ends else "it was killed without a word"

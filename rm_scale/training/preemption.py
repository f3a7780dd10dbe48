"""Being asked to stop: signals, a STOP file and the wall clock, remembered from the first moment of the process.

Nothing heavy is imported here, so that the handlers stand before torch is read: a signal that came during those seconds
would otherwise end the rank without a trace. What the ranks then agree on is in `rm_scale.training.stopping`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import FrameType

EXIT_REQUEUE = 85
"""Exit code of a run that stopped on request after a whole checkpoint was saved: start it again."""

STOP_FILE = "STOP"

FLOOR_SECONDS = 60.0
"""Least time before the wall clock's end at which a checkpoint is begun, when nothing else was asked for."""


class StopReason(IntEnum):
    """Why a run is to stop. When several are given, the largest counts."""

    NONE = 0
    WALL_CLOCK = 1
    STOP_FILE = 2
    SIGUSR1 = 3
    SIGTERM = 4

    @property
    def text(self) -> str:
        """For people and records."""
        return {1: "wall clock", 2: "STOP file", 3: "SIGUSR1", 4: "SIGTERM"}.get(int(self), "none")


_SIGNALS = {signal.SIGUSR1: StopReason.SIGUSR1, signal.SIGTERM: StopReason.SIGTERM}
_received: dict[StopReason, float] = {}


def watch_signals() -> None:
    """Remember SIGUSR1 and SIGTERM instead of dying of them. Safe to call again; only the main thread may."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    """Only note it: a handler runs between any two instructions, where saving would tear the step apart."""
    _received.setdefault(_SIGNALS[signal.Signals(number)], time.time())


def received_signal() -> StopReason:
    """The signal this process has got, if any."""
    return max(_received, default=StopReason.NONE)


def received_at() -> float | None:
    """When the first one came, unix seconds."""
    return min(_received.values(), default=None)


def forget_signals() -> None:
    """Start anew, for another run in this process."""
    _received.clear()


def end_time(environ: Mapping[str, str] | None = None) -> float | None:
    """When this job will be ended, unix seconds: `RM_SCALE_END_TIME`, else Slurm's `SLURM_JOB_END_TIME`.

    A value that is no number is as good as none: a run must not die of a hint.
    """
    env = os.environ if environ is None else environ
    for name in ("RM_SCALE_END_TIME", "SLURM_JOB_END_TIME"):
        try:
            return float(env[name])
        except (KeyError, ValueError):
            continue
    return None


def margin_seconds(asked: float | None, save_seconds: float, step_seconds: float) -> float:
    """How long before the end a checkpoint must be begun.

    Args:
        asked: the setting `stop_margin_seconds`, if given.
        save_seconds: the longest save so far; 0 when there was none.
        step_seconds: the longest of the last steps.

    Returns:
        Seconds: room for a save twice as slow as seen, and for two more steps, since the clock is read between steps.
    """
    if asked is not None:
        return asked
    return max(FLOOR_SECONDS, 2 * save_seconds + 2 * step_seconds + 10.0)


def reason_now(output_dir: Path, margin: float, environ: Mapping[str, str] | None = None) -> StopReason:
    """What asks this process to stop at this moment; only rank 0 should look at file and clock."""
    reason = received_signal()
    if reason is StopReason.NONE and (output_dir / STOP_FILE).exists():
        reason = StopReason.STOP_FILE
    ends = end_time(environ)
    if reason is StopReason.NONE and ends is not None and ends - time.time() < margin:
        reason = StopReason.WALL_CLOCK
    return reason

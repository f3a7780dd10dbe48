"""Requests to stop: signals, a STOP file and the wall clock.

The handlers of signals are installed before torch is imported, which takes seconds: a signal in that time would end
the rank without a trace. So nothing heavy is imported here. `rm_scale.training.agreed_stop` lets the ranks agree.
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
"""A checkpoint is begun at least this long before the job's time is up, unless `stop_margin_seconds` is set."""


class StopReason(IntEnum):
    """Why a run is to stop. When there are several reasons, the largest counts."""

    NONE = 0
    WALL_CLOCK = 1
    STOP_FILE = 2
    SIGUSR1 = 3
    SIGTERM = 4

    @property
    def text(self) -> str:
        """The reason in words, for logs and records."""
        return {1: "wall clock", 2: "STOP file", 3: "SIGUSR1", 4: "SIGTERM"}.get(int(self), "none")


_SIGNALS: dict[int, StopReason] = {signal.SIGUSR1: StopReason.SIGUSR1, signal.SIGTERM: StopReason.SIGTERM}
_received: dict[StopReason, float] = {}

FIRST_ATTEMPT_SIGNAL, NUM_ATTEMPT_SIGNALS = 40, 20
"""Real-time signals by which a Slurm job's script asks the ranks of one attempt to stop (`slurm/common/signals.sh`).

A request that is still on its way when Slurm starts the job again must not stop the next attempt: it has another
number. The C library keeps 32 and 33 for itself.
"""


def attempt_signal(attempt: int) -> int:
    """Return the signal that asks the ranks of a Slurm job's attempt to stop, and no other attempt's.

    Args:
        attempt: how often the job was restarted before.
    """
    return FIRST_ATTEMPT_SIGNAL + attempt % NUM_ATTEMPT_SIGNALS


def ignore_attempt_signals() -> None:
    """Ignore the signals of all attempts, here and in processes started from now on."""
    for attempt in range(NUM_ATTEMPT_SIGNALS):
        signal.signal(attempt_signal(attempt), signal.SIG_IGN)


def watch_signals(environ: Mapping[str, str] | None = None) -> None:
    """Remember SIGUSR1, SIGTERM and this attempt's own signal instead of dying of them.

    Outside the main thread, do nothing.

    Args:
        environ: `RM_SCALE_ATTEMPT` in it names the attempt of a job that was started by the job scripts.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        signal.signal(number, _remember)
    attempt = (os.environ if environ is None else environ).get("RM_SCALE_ATTEMPT", "")
    if attempt.isascii() and attempt.isdigit():
        ignore_attempt_signals()
        signal.signal(attempt_signal(int(attempt)), _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    """Note the time, and nothing else: a handler runs between any two instructions, in the middle of a step."""
    _received.setdefault(_SIGNALS.get(number, StopReason.SIGUSR1), time.time())


def received_signal() -> StopReason:
    """Return the signal that this process has got, `NONE` without one."""
    return max(_received, default=StopReason.NONE)


def received_at() -> float | None:
    """Return when the first signal came, in unix seconds; `None` without one."""
    return min(_received.values(), default=None)


def forget_signals() -> None:
    """Forget all signals, for another run in this process."""
    _received.clear()


def end_time(environ: Mapping[str, str] | None = None) -> float | None:
    """Return when this job's time is up, in unix seconds, `None` when that is not known.

    Read from `RM_SCALE_END_TIME`, else from Slurm's `SLURM_JOB_END_TIME`. A value that is no number is ignored: it is
    only a hint, and no reason to end a run.
    """
    env = os.environ if environ is None else environ
    for name in ("RM_SCALE_END_TIME", "SLURM_JOB_END_TIME"):
        try:
            return float(env[name])
        except (KeyError, ValueError):
            continue
    return None


def margin_seconds(asked: float | None, save_seconds: float, step_seconds: float) -> float:
    """Return how long before the job's time is up a checkpoint must be begun.

    Args:
        asked: the setting `stop_margin_seconds`, if given.
        save_seconds: the longest save so far; 0 when there was none.
        step_seconds: the longest of the last steps.

    Returns:
        Seconds: enough for a save twice as slow as any so far and for two more steps (the clock is read between steps).
    """
    if asked is not None:
        return asked
    return max(FLOOR_SECONDS, 2 * save_seconds + 2 * step_seconds + 10.0)


def reason_now(output_dir: Path, margin: float, environ: Mapping[str, str] | None = None) -> StopReason:
    """Return what asks this process to stop at this moment; only rank 0 should look at file and clock."""
    reason = received_signal()
    if reason is StopReason.NONE and (output_dir / STOP_FILE).exists():
        reason = StopReason.STOP_FILE
    ends = end_time(environ)
    if reason is StopReason.NONE and ends is not None and ends - time.time() < margin:
        reason = StopReason.WALL_CLOCK
    return reason

"""Requests to stop that a process gets: which signals count, and whose."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rm_scale.training.preemption import NUM_ATTEMPT_SIGNALS, attempt_signal

WATCH = """
import os, signal, sys
from rm_scale.training.preemption import received_signal, watch_signals
watch_signals({"RM_SCALE_ATTEMPT": sys.argv[1]} if sys.argv[1] else {})
os.kill(os.getpid(), int(sys.argv[2]))
print(received_signal().name)
"""


def outcome(attempt: str, number: int) -> str:
    """What a process of an attempt makes of a signal."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, attempt, str(number)], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_request_for_an_earlier_attempt_is_ignored() -> None:
    """One that was still on its way when an administrator requeued the job stopped the next attempt at once."""
    assert outcome("1", attempt_signal(0)) == "NONE"
    assert outcome("1", attempt_signal(1)) == "SIGUSR1"


@pytest.mark.parametrize(("number", "name"), [(10, "SIGUSR1"), (15, "SIGTERM")])
def test_anybodys_request_counts_in_every_attempt(number: int, name: str) -> None:
    assert outcome("3", number) == outcome("", number) == name


def test_the_signals_of_attempts_are_real_time_signals() -> None:
    numbers = {attempt_signal(attempt) for attempt in range(1000)}
    assert len(numbers) == NUM_ATTEMPT_SIGNALS and min(numbers) >= 34 and max(numbers) <= 64

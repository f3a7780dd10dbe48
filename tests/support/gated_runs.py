"""Runs that wait at the end of chosen steps, while the test changes the world around them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.launching import REPOSITORY, deepspeed_command, environment

RUNNER = REPOSITORY / "tests" / "support" / "gated_train.py"
SECONDS = 600
"""A limit for a state to come about, not a guess of when."""


class GatedRun:
    """A training that waits at the end of the steps named by `gates`, from which its log is read."""

    def __init__(
        self,
        folder: Path,
        words: list[str],
        gates: tuple[int | str, ...],
        log: Path,
        ranks: int = 1,
        first: int = 0,
        **env: str,
    ) -> None:
        self.folder, self.log = folder, log
        folder.mkdir()
        for gate in gates:
            (folder / f"stop-{gate}").touch()
        command = (
            [sys.executable, str(RUNNER), *words] if ranks == 1 else deepspeed_command(RUNNER, *words, ranks=ranks)
        )
        gated = environment(RM_SCALE_TEST_GATES=str(folder), RM_SCALE_TEST_FIRST_STEP=str(first), **env)
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=gated, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, state: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not state():
            assert self.process.poll() is None, f"ended before {what}:\n{self.text()[-6000:]}"
            assert time.monotonic() < end, f"{what} did not come about:\n{self.text()[-6000:]}"
            time.sleep(0.05)

    def at(self, gate: int | str) -> int:
        """Wait until the run waits there; give the process id of rank 0."""
        place = self.folder / f"at-{gate}"
        self.wait_for(place.exists, f"the gate {gate}")
        return int(place.read_text())

    def go(self, gate: int | str, seconds_left: float | None = None) -> None:
        part = self.folder / f"go-{gate}.part"
        part.write_text("" if seconds_left is None else str(seconds_left))
        part.rename(self.folder / f"go-{gate}")

    def end(self) -> int:
        """Wait for its end; give the exit code."""
        return self.process.wait(SECONDS)

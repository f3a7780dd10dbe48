"""The task of each node of a Slurm job: check the node together with the others, or start and watch its ranks.

It takes the place of torchrun, which is ended by the signal that Slurm sends before a time limit, and reports every
failure as exit code 1, so that a run that saved and stopped can't be told from one that failed. This task passes
signals on to its ranks, keeps a log for each, and reports their exit codes. Standard library only, so that it starts
at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rm_scale.files import write_whole
from rm_scale.launch.kill_evidence import KILLED, LOOK_SECONDS, KillEvidence
from rm_scale.meeting import EXIT_PORT_TAKEN
from rm_scale.slurm.job_start import FENCE_SECONDS, Start, end_path, read_fence, read_start
from rm_scale.slurm.rank_logs import LAST_WORDS_SECONDS, RankOutput, log_file, standard_error, standard_output
from rm_scale.texts import printable
from rm_scale.training.preemption import EXIT_REQUEUE, attempt_signal, ignore_attempt_signals

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
REPEAT_SECONDS = 5.0
"""A rank ignores signals until training installs its handler, so a request to stop is repeated until all have ended."""
EXIT_REPLACED = 3
END_BYTES = 4096
"""Room for the record of the node's end, taken at its start: the disk may be full by then."""

_NUM_LAST_LINES, _NUM_SEARCHED_LINES = 8, 100
_DEVICE_FAULT = re.compile(r"(CUDA|HIP) error: (?!device-side assert|out of memory|invalid )")
"""In a rank's last words: an error of this node's device rather than of the program."""
_MEMORY_FIX = "compare the plan's host memory (rm-scale plan), ask for more of it (--mem)"
_DRAIN_SECONDS = 2.0
"""How long messages are waited for that come from another disk or another stream."""


def main(argv: list[str] | None = None) -> int:
    """Run the ranks of this node, or with `--check` the checks before them; return the task's exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    start = read_start(Path(arguments[-1]))
    if "--check" in arguments:
        from rm_scale.slurm.node_check import check_node

        return check_node(start, this_node(start))
    return Node(start, this_node(start)).run()


def this_node(start: Start) -> int:
    """Return this node's place in the job's list of nodes."""
    name = os.environ.get("SLURMD_NODENAME", "")
    return start.nodes.index(name) if name in start.nodes else int(os.environ.get("SLURM_NODEID", "0"))


def rank_environment(start: Start, node: int, local_rank: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that tell a rank its place, as torchrun names them, added to `base`."""
    rank = node * start.ranks_per_node + local_rank
    place = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": start.world_size,
        "LOCAL_WORLD_SIZE": start.ranks_per_node,
        "GROUP_RANK": node,
        "MASTER_ADDR": start.master_addr,
        "MASTER_PORT": start.master_port,
        "RM_SCALE_ATTEMPT": start.attempt,
    }
    return {**base, **{name: str(value) for name, value in place.items()}}


def exit_code(returncode: int) -> int:
    """Return a process's exit code as a shell shows it: 128 + N when signal N ended it."""
    return 128 - returncode if returncode < 0 else returncode


def describe(code: int) -> str:
    """Say what a rank's exit code means."""
    known = {
        0: "finished",
        1: "failed (its traceback is in its log)",
        2: "refused the run (its message is in its log)",
        EXIT_REQUEUE: "saved and stopped, as asked",
        KILLED: "was killed (signal 9)",
        EXIT_PORT_TAKEN: "found its port taken by another program",
        139: "crashed (signal 11, in compiled code)",
    }
    return known.get(code, f"was ended by signal {code - 128}" if code > 128 else f"ended with code {code}")


@dataclass
class Rank:
    """One process of this node."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    output: RankOutput

    @property
    def code(self) -> int | None:
        """Exit code, `None` while it runs."""
        returncode = self.process.poll()
        return None if returncode is None else exit_code(returncode)


class Node:
    """The ranks of one node, from their start to their end.

    Args:
        start: what the attempt was started with.
        place: of this node among the job's.
    """

    def __init__(self, start: Start, place: int) -> None:
        self.start = start
        self.place = place
        self.name = start.nodes[place]
        self.folder = Path(start.folder)
        self.kill_seconds = float(os.environ.get("RM_SCALE_KILL_SECONDS", "30"))
        self.asked: signal.Signals | None = None
        self.ranks: list[Rank] = []
        self.reason = ""
        self.failed_at: float | None = None
        self.blames_device = False
        self.evidence = KillEvidence()
        self.messages = standard_error()

    def run(self) -> int:
        """Start the ranks, wait for them, write down how they ended; return this task's exit code.

        A node whose ranks have saved and stopped ends with 0: with another code srun would kill the tasks of other
        nodes, which may still be saving. `requeue` reads from the records that the job is to be requeued.
        """
        # Ignored by this process, and so by what it starts, until each installs its own handler.
        ignore_attempt_signals()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._reserve_end()
        self.ranks = [self._spawn(local_rank) for local_rank in range(self.start.ranks_per_node)]
        self.messages.begin()
        for rank in self.ranks:
            rank.output.begin()
        for wanted in (*STOP_SIGNALS, attempt_signal(self.start.attempt)):
            signal.signal(wanted, self._on_signal)
        self._wait()
        code = self._judge()
        self._write_end(code)  # before the logs, which a disk may hold up until Slurm ends this task
        self._finish_logs()
        return 0 if code == EXIT_REQUEUE else code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals.SIGTERM if number == signal.SIGTERM else signal.Signals.SIGUSR1

    def _say(self, text: str) -> None:
        """Tell the job's log. Never wait for it: it may lie on a full disk, or on one that hangs."""
        self.messages.add(f"rm_scale {self.name}: {text}\n".encode())

    # --- Starting ----------------------------------------------------------------------------------------------------

    def _spawn(self, local_rank: int) -> Rank:
        number = self.place * self.start.ranks_per_node + local_rank
        log = self.folder / f"{self.name}.rank{number}.log"
        process = subprocess.Popen(
            [sys.executable, "-u", self.start.train, *self.start.settings],
            env=rank_environment(self.start, self.place, local_rank, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent,
        )
        assert process.stdout is not None
        destinations = [log_file(log, self._say)]
        if number == 0:  # its output is the job's
            destinations.append(standard_output(self._say))
        return Rank(number, process, log, RankOutput(process.stdout.fileno(), destinations))

    # --- Waiting -----------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        forwarded = fenced = looked = 0.0
        while any(rank.code is None for rank in self.ranks):
            time.sleep(0.1)
            now = time.monotonic()
            if self.asked is not None and now - forwarded >= REPEAT_SECONDS:
                self._send(signal.SIGUSR1)
                forwarded = now
            if now - fenced >= FENCE_SECONDS:
                fenced = now
                if self._is_replaced():
                    return
            if now - looked >= LOOK_SECONDS:
                looked = now
                self.evidence.look(rank.process.pid for rank in self.ranks)
            self._end_survivors()
        self._end_survivors()  # ranks that had all ended by the first look, or since the last one

    def _send(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            if rank.code is None:
                with contextlib.suppress(ProcessLookupError):
                    rank.process.send_signal(number)

    def _is_replaced(self) -> bool:
        """Return whether a later attempt of the job has begun elsewhere; if so, kill all ranks first."""
        present = read_fence(self.folder.parent)
        if present is None or present <= self.start.attempt:
            return False
        self._send(signal.SIGKILL)
        for rank in self.ranks:
            rank.process.wait()
        self.reason = f"the job's attempt {present} has begun elsewhere; ended so that two attempts don't write at once"
        return True

    def _end_survivors(self) -> None:
        """Once a rank has failed, give the others time to say what they saw, then end them."""
        failed = [rank for rank in self.ranks if rank.code not in (None, 0, EXIT_REQUEUE)]
        if not failed:
            return
        now = time.time()
        if self.failed_at is None:
            self.failed_at = now
            # A rank that was ended says nothing; one that missed it a moment later blames the connection.
            first = max(failed, key=lambda rank: (rank.code == EXIT_PORT_TAKEN, (rank.code or 0) > 128))
            why = f" {self.evidence.text([first.process.pid], _MEMORY_FIX)}" if first.code == KILLED else ""
            self.reason = f"rank {first.number} {describe(first.code or 0)}{why}"
            self._show_failure(first)
        if now - self.failed_at > self.kill_seconds or EXIT_PORT_TAKEN in [rank.code for rank in failed]:
            self._send(signal.SIGKILL)  # those that look for rank 0 at its port would find the other program

    def _show_failure(self, rank: Rank) -> None:
        words = rank.output.last_words(_NUM_SEARCHED_LINES)
        self.blames_device = any(_DEVICE_FAULT.search(line) for line in words)
        lines = words[-_NUM_LAST_LINES:]
        if rank.number == 0:  # its lines are in the job's log: let them come before this
            rank.output.drain(_DRAIN_SECONDS)
        self._say(f"{self.reason}; log: {rank.log}")
        if rank.number != 0:
            told = "".join(f"  rank {rank.number}| {printable(line)}\n" for line in lines)
            self.messages.add(told.encode())

    # --- The end -----------------------------------------------------------------------------------------------------

    def _finish_logs(self) -> None:
        """Bring the ranks' last words to the disk, and say where that did not succeed."""
        for rank in self.ranks:
            rank.output.end()
        end = time.monotonic() + LAST_WORDS_SECONDS
        for rank in self.ranks:
            for name in rank.output.close(end - time.monotonic()):
                self._say(f"{name} lacks the last words of rank {rank.number}: they could not be written")
        self.messages.close(max(_DRAIN_SECONDS, end - time.monotonic()))

    def _reserve_end(self) -> None:
        """Take room for the record of the end; without it, a full disk would make this node count as lost.

        A record that is there is of ranks that found their port taken, earlier in this attempt.
        """
        with contextlib.suppress(OSError):
            end_path(self.folder, self.name).unlink(missing_ok=True)
            self._reserve.write_bytes(b" " * END_BYTES)

    @property
    def _reserve(self) -> Path:
        return self.folder / f".{self.name}.end"

    def _judge(self) -> int:
        codes = {rank.code or 0 for rank in self.ranks}
        if self.reason.startswith("the job's attempt"):
            self._say(self.reason)
            return EXIT_REPLACED
        if codes <= {0, EXIT_REQUEUE}:
            return EXIT_REQUEUE if EXIT_REQUEUE in codes else 0
        first = next(rank for rank in self.ranks if self.reason.startswith(f"rank {rank.number} "))
        return first.code or 1

    def _write_end(self, code: int) -> None:
        record = {
            "node": self.name,
            "code": code,
            "codes": {str(rank.number): rank.code for rank in self.ranks},
            "reason": self.reason,
            "failed_at": self.failed_at,
            "blames_device": self.blames_device,
            "asked": self.asked.name if self.asked is not None else None,
            "time": time.time(),
        }
        text = json.dumps(record).encode().ljust(END_BYTES)  # in the room that was taken, and no more
        try:
            with self._reserve.open("r+b", buffering=0) as file:
                file.write(text)
            os.replace(self._reserve, end_path(self.folder, self.name))
        except OSError:
            with contextlib.suppress(OSError):  # a lost disk must not hide the exit code
                write_whole(end_path(self.folder, self.name), json.dumps(record))


def _end_with_parent() -> None:
    """Have the kernel kill this rank when the process that started it ends, whatever ended that."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

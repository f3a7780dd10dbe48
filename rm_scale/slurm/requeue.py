"""Decide what becomes of a job when its ranks have ended: an exit code, or a requeue.

`slurm/common.sh` runs `python -m rm_scale.slurm.requeue ATTEMPT_FOLDER --srun_code N ...` and does what the last line
of standard output says: `exit CODE`, or `requeue CODE`, where CODE is the exit code in case Slurm refuses the requeue.
Reasons go to standard error, and the decision to the job's `events.jsonl`. Standard library only, so that it is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.files import append_json_line, read_json_object
from rm_scale.slurm.job_start import START_FILE, Start, read_start
from rm_scale.slurm.node import EXIT_REPLACED, describe
from rm_scale.training.preemption import EXIT_REQUEUE

NO_RANKS = "none"
"""Stands for srun's exit code where the job was asked to stop before any rank was started."""


@dataclass(frozen=True)
class Job:
    """The job when its ranks have ended.

    Attributes:
        restarts: how often Slurm has restarted it so far.
        max_restarts: how often it may be restarted, RM_SCALE_MAX_RESTARTS.
        state: Slurm's, such as "RUNNING"; empty when Slurm does not answer.
        seconds_left: until its time limit; infinite where the limit is not known.
    """

    restarts: int
    max_restarts: int
    state: str
    seconds_left: float


@dataclass(frozen=True)
class Decision:
    """What the job's script is to do.

    Attributes:
        requeue: hand the job back to Slurm rather than exit.
        code: exit code of the script, also when Slurm refuses the requeue.
        events: for the job's records, in order.
        reason: for the log; empty when there is nothing to say.
    """

    requeue: bool
    code: int
    events: tuple[str, ...]
    reason: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Decide, record and print; always return 0."""
    options = _parser().parse_args(argv)
    folder: Path = options.folder
    if options.srun_code == NO_RANKS:
        code, reason = EXIT_REQUEUE, ""
    else:
        code, reason = judge(read_start(folder / START_FILE), read_ends(folder), int(options.srun_code))
    left = float(options.end_time) - time.time() if options.end_time else math.inf
    decision = decide(code, Job(options.restarts, options.max_restarts, options.state, left))
    for event in decision.events:
        _record(folder.parent, event, options.restarts, decision.code)
    for text in (reason, decision.reason):
        if text:
            print(f"rm_scale: {text}", file=sys.stderr, flush=True)
    print("requeue" if decision.requeue else "exit", decision.code)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rm_scale.slurm.requeue", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="of this attempt")
    parser.add_argument("--srun_code", required=True, help=f"exit code of srun; {NO_RANKS}: no rank was started")
    parser.add_argument("--restarts", type=int, required=True, help="restarts of the job so far")
    parser.add_argument("--max_restarts", type=int, required=True, help="RM_SCALE_MAX_RESTARTS")
    parser.add_argument("--state", default="", help="the job's state as squeue shows it; empty when it does not answer")
    parser.add_argument("--end_time", default="", help="Unix seconds of the time limit; empty where it is not known")
    return parser


# --- How the ranks ended ---------------------------------------------------------------------------------------------


def read_ends(folder: Path) -> dict[str, dict[str, Any]]:
    """Return how each node ended, by its name; a node that was lost wrote nothing."""
    ends = [read_json_object(path) for path in sorted(folder.glob("*.end.json"))]
    return {str(end["node"]): end for end in ends if "node" in end}


def judge(start: Start, ends: dict[str, dict[str, Any]], srun_code: int) -> tuple[int, str]:
    """Return the exit code that the ranks' ends come to, and the reason for the log.

    The first rank that failed decides: srun reports the largest exit code of any task, which is that of the tasks it
    killed because of the first failure.

    Args:
        start: what the attempt was started with.
        ends: how each node ended, as `read_ends` returns them.
        srun_code: exit code of srun.
    """
    failed = [end for end in ends.values() if end["code"] not in (0, EXIT_REQUEUE, EXIT_REPLACED)]
    if failed:
        first = min(failed, key=lambda end: end["failed_at"] or end["time"])
        return int(first["code"]), f"{first['node']}: {first['reason']}"
    missing = [node for node in start.nodes if node not in ends]
    if missing:
        return srun_code or 1, f"{', '.join(missing)}: lost or killed before saying how it ended; {_srun(srun_code)}"
    codes = {int(end["code"]) for end in ends.values()}
    for code in (EXIT_REPLACED, EXIT_REQUEUE):
        if code in codes:
            return code, ""
    return srun_code, "" if srun_code == 0 else _srun(srun_code)


def _srun(code: int) -> str:
    return f"srun {describe(code)}"


# --- What follows ----------------------------------------------------------------------------------------------------


def decide(code: int, job: Job) -> Decision:
    """Requeue a job that has saved and stopped, unless it was restarted too often or is being ended from outside.

    Args:
        code: that the ranks' ends come to.
        job: what Slurm and the site say of it.
    """
    if code != EXIT_REQUEUE:
        return Decision(False, code, ("end",))
    if job.restarts >= job.max_restarts:
        reason = f"restarted {job.restarts} times (RM_SCALE_MAX_RESTARTS): not requeued; submit again to go on"
        return Decision(False, code, ("stopped",), reason)
    # Slurm shows a job that is being ended as COMPLETING, whatever the reason. At the time limit it may be requeued.
    # Before that, either its owner cancelled it and wants no further attempt, or Slurm preempts and requeues it itself.
    if job.state not in ("", "RUNNING") and job.seconds_left > 0:
        reason = f"saved and stopped; the job is being ended from outside ({job.state}), so it does not requeue itself"
        return Decision(False, code, ("stopped", "cancelled"), reason)
    return Decision(True, code, ("stopped", "requeue"))


def _record(job_folder: Path, event: str, attempt: int, code: int) -> None:
    """Add an event to the job's records, in the form of rm_scale_note in `slurm/common.sh`."""
    detail = {"code": str(code)} if event == "end" else {"script": os.environ.get("RM_SCALE_TIER", "")}
    record = {"event": event, "time": round(time.time(), 3), "attempt": attempt, **detail}
    with contextlib.suppress(OSError):  # a full disk must not keep the job from being requeued
        append_json_line(job_folder / "events.jsonl", record)


if __name__ == "__main__":
    sys.exit(main())

"""Decide what becomes of a job when its ranks have ended: an exit code, a requeue, or the ranks once more.

`slurm/common/end.sh` runs `python -m rm_scale.slurm.requeue ATTEMPT_FOLDER --srun_code N ...` and does what the last
line of standard output says:

- `exit CODE`;
- `requeue CODE [NODE]`, where CODE is the exit code in case Slurm refuses, and NODE one to leave out from now on;
- `again CODE`: start the ranks once more in this attempt, at another port.

Reasons go to standard error, and the decision to the job's `events.jsonl`. Standard library only, so that it is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.files import append_json_line, read_json_lines, read_json_object
from rm_scale.meeting import EXIT_PORT_TAKEN
from rm_scale.slurm.job_start import START_FILE, Start, read_start
from rm_scale.slurm.node import EXIT_REPLACED, describe
from rm_scale.training.attempts import read_attempts
from rm_scale.training.preemption import EXIT_REQUEUE

NO_RANKS = "none"
"""Stands for srun's exit code where the job was asked to stop before any rank was started."""


MAX_PORTS = 5
"""So many ports are tried in one attempt of a job."""

EXIT_SETTINGS = 2
"""Exit code of ranks that refuse the run with a message: it would be refused again."""

MAX_IDLE = 3
"""After so many attempts in a row that were stopped before training began, the job is not requeued."""


@dataclass(frozen=True)
class Job:
    """The job when its ranks have ended.

    Attributes:
        restarts: how often Slurm had restarted it when this attempt began.
        max_restarts: how often it may be restarted, RM_SCALE_MAX_RESTARTS.
        state: Slurm's, such as "RUNNING"; empty when Slurm does not answer.
        is_at_limit: Slurm ends it because its time is up. Slurm itself says so: the limit may have been moved, and a
            suspended job's time stands still.
        is_preempted: Slurm takes its nodes for another job.
        is_requeued: Slurm has already decided to start it again.
        retries_left: attempts that may still crash, of RM_SCALE_RETRIES.
        has_saved: this attempt has published a checkpoint.
        ports_tried: in this attempt.
        idle_attempts: that were stopped in a row before training began, this one too; 0 when it has begun.
    """

    restarts: int
    max_restarts: int
    state: str = ""
    is_at_limit: bool = False
    is_preempted: bool = False
    is_requeued: bool = False
    retries_left: int = 0
    has_saved: bool = False
    ports_tried: int = 0
    idle_attempts: int = 0


@dataclass(frozen=True)
class Decision:
    """What the job's script is to do.

    Attributes:
        action: "exit", "requeue" or "again".
        code: exit code of the script, also when Slurm refuses the requeue.
        events: for the job's records, in order.
        reason: for the log; empty when there is nothing to say.
    """

    action: str
    code: int
    events: tuple[str, ...]
    reason: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Decide, record and print; always return 0."""
    options = _parser().parse_args(argv)
    folder: Path = options.folder
    code, reason, node = EXIT_REQUEUE, "", ""
    if options.srun_code != NO_RANKS:
        start, ends = read_start(folder / START_FILE), read_ends(folder)
        code, reason = judge(start, ends, int(options.srun_code))
        node = failed_node(start, ends)
    decision = decide(code, read_job(options))
    for event in decision.events:
        _record(folder.parent, event, options.restarts, decision.code)
    for text in (reason, decision.reason):
        if text:
            print(f"rm_scale: {text}", file=sys.stderr, flush=True)
    left_out = [node] if node and "retry" in decision.events else []
    print(decision.action, decision.code, *left_out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rm_scale.slurm.requeue", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="of this attempt")
    parser.add_argument("--srun_code", required=True, help=f"exit code of srun; {NO_RANKS}: no rank was started")
    parser.add_argument("--restarts", type=int, required=True, help="restarts of the job so far")
    parser.add_argument("--max_restarts", type=int, required=True, help="RM_SCALE_MAX_RESTARTS")
    parser.add_argument("--retries", type=int, default=0, help="RM_SCALE_RETRIES")
    parser.add_argument("--ports_tried", type=int, default=0, help="in this attempt, before this one")
    parser.add_argument("--job", default="", help="what scontrol --oneliner shows of it; empty when it does not answer")
    parser.add_argument("--idle", type=int, default=0, help="attempts in a row without training, this one too")
    return parser


def read_job(options: argparse.Namespace) -> Job:
    """Return the job, from what Slurm shows of it and from its records."""
    shown = dict(re.findall(r"(\w[\w:/]*)=(\S*)", options.job))
    folder: Path = options.folder
    used = sum(event.get("event") == "retry" for event in read_json_lines(folder.parent / "events.jsonl"))
    restarts = shown.get("Restarts", "")
    return Job(
        restarts=options.restarts,
        max_restarts=options.max_restarts,
        state=shown.get("JobState", ""),
        is_at_limit=shown.get("Reason") == "TimeLimit",
        is_preempted=is_preempted(shown),
        is_requeued=restarts.isdigit() and int(restarts) > options.restarts,
        retries_left=options.retries - used,
        has_saved=_has_saved(folder),
        ports_tried=options.ports_tried,
        idle_attempts=options.idle,
    )


def is_preempted(shown: Mapping[str, str]) -> bool:
    """Return whether Slurm takes this attempt's nodes for another job. As rm_scale_is_preempted in `slurm/common/`.

    PreemptTime alone does not say so: a job that was only suspended meanwhile (PreemptMode=SUSPEND,GANG) has one too,
    and so may one whose earlier attempt was preempted.

    Args:
        shown: what scontrol shows of the job. Its times, such as 2026-11-30T23:31:21, sort as texts.
    """
    at, began, suspended = (shown.get(name, "") for name in ("PreemptTime", "StartTime", "SuspendTime"))
    if not at[:1].isdigit():
        return False
    return not (began[:1].isdigit() and at < began) and not (suspended[:1].isdigit() and suspended >= at)


def _has_saved(folder: Path) -> bool:
    """Return whether an attempt has published a checkpoint; its `start.json` names the run."""
    try:
        start = read_start(folder / START_FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return any(
        event["event"] == "saved"
        and str(event.get("job_id")) == str(start.job_id)
        and event.get("restart_count") == start.attempt
        for event in read_attempts(Path(start.output_dir) / "run")
    )


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


def failed_node(start: Start, ends: dict[str, dict[str, Any]]) -> str:
    """Return the node that the next attempt is to keep off; empty where none is to blame.

    It is that of the rank which failed first if a signal ended that rank or its device failed: a traceback is the
    program's, on any node. Else it is the one that alone said nothing at its end.
    """
    failed = [end for end in ends.values() if end["code"] not in (0, EXIT_REQUEUE, EXIT_REPLACED)]
    if failed:
        first = min(failed, key=lambda end: end["failed_at"] or end["time"])
        return str(first["node"]) if first["code"] > 128 or first.get("blames_device") else ""
    missing = [node for node in start.nodes if node not in ends]
    return missing[0] if len(missing) == 1 else ""


def _srun(code: int) -> str:
    return f"srun {describe(code)}"


# --- What follows ----------------------------------------------------------------------------------------------------


def decide(code: int, job: Job) -> Decision:
    """Requeue a job that has saved and stopped, unless it was restarted too often or its owner ends it.

    Args:
        code: that the ranks' ends come to.
        job: what Slurm, the site and the run's records say of it.
    """
    if code == EXIT_PORT_TAKEN:
        if job.ports_tried + 1 < MAX_PORTS:
            return Decision("again", code, ("port_taken",), "another program has taken the port: trying another")
        return Decision("exit", code, ("end",), f"{MAX_PORTS} ports in a row were taken by others. Fix: submit again.")
    if code != EXIT_REQUEUE:
        return _decide_crash(code, job)
    if job.restarts >= job.max_restarts:
        reason = f"restarted {job.restarts} times (RM_SCALE_MAX_RESTARTS): not requeued; submit again to go on"
        return Decision("exit", code, ("stopped",), reason)
    if job.is_requeued:
        return Decision("exit", code, ("stopped", "requeue"), "saved and stopped; Slurm has requeued the job itself")
    # Slurm shows a job that is being ended as COMPLETING, whatever the reason. At the time limit, and when it is
    # preempted and Slurm has not requeued it itself (PreemptMode=CANCEL), it may be requeued. Else its owner cancelled
    # it and wants no further attempt.
    is_lost = job.is_at_limit or job.is_preempted
    if job.state not in ("", "RUNNING") and not is_lost:
        reason = f"saved and stopped; the job is being ended from outside ({job.state}), so it does not requeue itself"
        return Decision("exit", code, ("stopped", "cancelled"), reason)
    if job.idle_attempts == 0 or job.is_preempted:
        return Decision("requeue", code, ("stopped", "requeue"))
    if job.idle_attempts < MAX_IDLE:
        return Decision("requeue", code, ("idle", "stopped", "requeue"))
    reason = (
        f"the last {job.idle_attempts} attempts were stopped before training began, so the job is not requeued. Fix: "
        "see in the logs where the start hangs, or ask for more time; then submit the same command again"
    )
    return Decision("exit", EXIT_SETTINGS, ("idle", "end"), reason)


def _decide_crash(code: int, job: Job) -> Decision:
    """Requeue a job whose ranks crashed where the site allows retries and the attempt has made progress."""
    is_crash = code not in (0, EXIT_SETTINGS, EXIT_REPLACED)
    if not is_crash or job.retries_left <= 0 or job.state not in ("", "RUNNING"):
        return Decision("exit", code, ("end",))
    if job.restarts >= job.max_restarts:
        return Decision("exit", code, ("end",), f"restarted {job.restarts} times (RM_SCALE_MAX_RESTARTS): not retried")
    if not job.has_saved:
        return Decision("exit", code, ("end",), "not retried: this attempt has saved no checkpoint, so it would repeat")
    reason = f"crashed after it had saved a checkpoint: retried ({job.retries_left} of RM_SCALE_RETRIES left)"
    return Decision("requeue", code, ("end", "retry", "requeue"), reason)


def _record(job_folder: Path, event: str, attempt: int, code: int) -> None:
    """Add an event to the job's records, in the form of rm_scale_note in `slurm/common.sh`."""
    detail = {"code": str(code)} if event == "end" else {"script": os.environ.get("RM_SCALE_TIER", "")}
    record = {"event": event, "time": round(time.time(), 3), "attempt": attempt, **detail}
    with contextlib.suppress(OSError):  # a full disk must not keep the job from being requeued
        append_json_line(job_folder / "events.jsonl", record)


if __name__ == "__main__":
    sys.exit(main())

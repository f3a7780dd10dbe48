"""`rm-scale slurm status JOB`: what Slurm says of a job, and what its records say of the run."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rm_scale.errors import UserError
from rm_scale.slurm.job_records import JobRecords, last_errors, read_records
from rm_scale.slurm.site import site_variables
from rm_scale.texts import one_line, printable

_RECENT_STEPS = 20


def run(options: argparse.Namespace) -> int:
    """Run `rm-scale slurm status`; return 0.

    Raises:
        UserError: the job's number makes no sense, or nobody knows the job.
    """
    if re.fullmatch(r"\d{1,12}(_\d{1,7})?", options.job, re.ASCII) is None:
        raise UserError(
            f"job={one_line(options.job, 200)!r}: must be a job's number. Fix: such as 123, or 123_4 of an array."
        )
    told = ask_slurm(options.job)
    records = find_records(told, options.job, options.logs)
    if not told and records is None:
        raise UserError(
            f"job {options.job}: Slurm does not know it (any more), and there are no records of it in "
            f"{options.logs or 'logs'}. Fix: --logs FOLDER, where the job's RM_SCALE_LOGS is."
        )
    answer = summarise(told, records)
    print(json.dumps(answer, indent=2) if options.json else printable(as_text(options.job, answer)))
    return 0


def ask_slurm(job: str) -> dict[str, str]:
    """Return `scontrol show job` as a dictionary; empty where Slurm does not know the job, or is not installed."""
    if shutil.which("scontrol") is None:
        return {}
    command = ["scontrol", "--oneliner", "show", "job", job]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return {}
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    return dict(re.findall(r"(\w[\w:/]*)=(\S*)", lines[0])) if lines else {}


def find_records(told: Mapping[str, str], job: str, logs: str | None) -> JobRecords | None:
    """Return the records in the job's folder; `None` without one.

    It is looked for below `logs`, else below the site's RM_SCALE_LOGS, in the folder where the job was submitted.
    """
    number = told.get("JobId", job)
    name = logs or site_variables().get("RM_SCALE_LOGS", "logs")
    for base in (told.get("WorkDir", "."), "."):
        folder = Path(base) / name / number
        if folder.is_dir():
            return read_records(folder)
    return None


def summarise(told: Mapping[str, str], records: JobRecords | None) -> dict[str, Any]:
    """Return everything that is known, as plain values."""
    answer: dict[str, Any] = {"slurm": _slurm_part(told)} if told else {}
    if records is None:
        return answer
    last = records.last
    answer |= {
        "logs": str(records.folder),
        "output_dir": last.output_dir if last is not None else None,
        "ranks": last.world_size if last is not None else None,
        "attempts": max((int(event.get("attempt", 0)) for event in records.events), default=0) + 1,
        **progress(records),
        **restart_times(records),
        "ends": [f"{end['node']}: {end['reason']}" for end in records.ends.values() if end.get("reason")],
        "last_errors": last_errors(records),
    }
    return answer


def _slurm_part(told: Mapping[str, str]) -> dict[str, str]:
    names = {
        "state": "JobState",
        "reason": "Reason",
        "nodes": "NodeList",
        "restarts": "Restarts",
        "run_time": "RunTime",
        "time_limit": "TimeLimit",
        "exit_code": "ExitCode",
        "name": "JobName",
    }
    return {ours: told[theirs] for ours, theirs in names.items() if told.get(theirs) not in (None, "", "(null)")}


def progress(records: JobRecords) -> dict[str, Any]:
    """Return steps made and to make, speed over the last logged steps, and seconds left."""
    steps = [line for line in records.metrics if "loss" in line and "step" in line]
    if not steps:
        return {"step": None, "total_steps": records.total_steps}
    answer: dict[str, Any] = {"step": int(steps[-1]["step"]), "total_steps": records.total_steps}
    recent = steps[-_RECENT_STEPS:]
    for name in ("loss", "accuracy"):
        if name in recent[-1]:
            answer[name] = recent[-1][name]
    for name in ("pairs_per_second", "real_tokens_per_second"):
        values = [float(line[name]) for line in recent if name in line]
        if values:
            answer[name] = sum(values) / len(values)
    step_seconds = _step_seconds(recent)
    if step_seconds is not None:
        answer["step_seconds"] = step_seconds
        if records.total_steps:
            answer["eta_seconds"] = max(0, records.total_steps - answer["step"]) * step_seconds
    return answer


def _step_seconds(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean time of a step; each logged line covers the steps since the line before, at its rate."""
    seconds, count = 0.0, 0
    for earlier, line in pairwise(lines):
        steps = int(line["step"]) - int(earlier["step"])
        if steps > 0 and line.get("num_pairs") and line.get("pairs_per_second"):
            seconds += float(line["num_pairs"]) / float(line["pairs_per_second"])
            count += steps
    return seconds / count if count else None


def restart_times(records: JobRecords) -> dict[str, Any]:
    """Return the seconds from each signal to its requeue, and from each later attempt's start to its first step."""
    to_requeue, to_first_step = [], []
    for attempt, begun in _times(records.events, "attempt").items():
        signal = _times(records.events, "signal").get(attempt)
        requeue = _times(records.events, "requeue").get(attempt)
        if signal is not None and requeue is not None:
            to_requeue.append(round(requeue - signal, 1))
        first = _times(records.attempts, "first_step").get(attempt)
        if attempt > 0 and first is not None:
            to_first_step.append(round(first - begun, 1))
    return {"signal_to_requeue_seconds": to_requeue, "start_to_first_resumed_step_seconds": to_first_step}


def _times(events: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Return the time of an event's first occurrence in each attempt."""
    found: dict[int, float] = {}
    for event in events:
        if event.get("event") == name:
            # Training counts all attempts of the output directory; Slurm's restarts are those of the job.
            attempt = event.get("restart_count", event.get("attempt"))
            if attempt is not None and event.get("time") is not None:
                found.setdefault(int(attempt), float(event["time"]))
    return found


def as_text(job: str, answer: Mapping[str, Any]) -> str:
    """Return a few lines for people."""
    lines = []
    slurm = answer.get("slurm")
    if slurm:
        where = f" on {slurm['nodes']}" if "nodes" in slurm else ""
        why = f" ({slurm['reason']})" if slurm.get("reason", "None") != "None" else ""
        lines.append(
            f"job {job} {slurm.get('name', '')}: {slurm.get('state', '?')}{why}{where}, {slurm.get('run_time', '?')} "
            f"of {slurm.get('time_limit', '?')}, restarts {slurm.get('restarts', '0')}"
        )
    else:
        lines.append(f"job {job}: Slurm does not know it any more; from its records")
    if "logs" not in answer:
        return "\n".join([*lines, "no records yet: it has not started, or its RM_SCALE_LOGS is elsewhere (--logs)"])
    lines += _progress_lines(answer)
    for name, what in (
        ("signal_to_requeue_seconds", "from signal to requeue"),
        ("start_to_first_resumed_step_seconds", "from start to first resumed step"),
    ):
        if answer[name]:
            lines.append(f"{what}: {', '.join(f'{value:.1f} s' for value in answer[name])}")
    lines += [f"ended: {reason}" for reason in answer["ends"]]
    lines += [f"output: {answer['output_dir']}", f"logs: {answer['logs']}"]
    if answer["last_errors"]:
        lines += ["last errors:", *(f"  {line}" for line in answer["last_errors"])]
    return "\n".join(lines)


def _progress_lines(answer: Mapping[str, Any]) -> list[str]:
    if answer.get("step") is None:
        return [f"attempt {answer['attempts']}: no step logged yet"]
    total = f" of {answer['total_steps']:,}" if answer.get("total_steps") else ""
    parts = [f"attempt {answer['attempts']}: step {answer['step']:,}{total}"]
    if "loss" in answer:
        parts.append(f"loss {answer['loss']:.4f}")
    if "accuracy" in answer:
        parts.append(f"accuracy {answer['accuracy']:.3f}")
    if "pairs_per_second" in answer:
        parts.append(f"{answer['pairs_per_second']:,.1f} pairs/s")
    if "real_tokens_per_second" in answer:
        parts.append(f"{answer['real_tokens_per_second']:,.0f} tokens/s")
    state = answer.get("slurm", {}).get("state", "")
    if "eta_seconds" in answer and state in {"RUNNING", "PENDING", "COMPLETING", ""} and answer["eta_seconds"] > 0:
        end = time.strftime("%F %H:%M", time.localtime(time.time() + answer["eta_seconds"]))
        parts.append(f"{answer['eta_seconds'] / 3600:.1f} h of training left, until {end} without a pause")
    return [", ".join(parts)]

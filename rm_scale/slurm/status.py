"""`rm-scale slurm status JOB`: what Slurm says of a job, and what its records say of the run."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rm_scale.errors import UserError
from rm_scale.json_values import as_number, as_whole
from rm_scale.slurm.job_records import JobRecords, last_errors, read_records
from rm_scale.slurm.site import site_variables
from rm_scale.texts import one_line, printable

_RECENT_STEPS = 20
_LONGEST_SECONDS = 10 * 365 * 86400
"""Longer than this nothing is predicted: a record holds a wrong value."""


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
    if is_array(options.job, told):
        tasks = [task_summary(task, find_records(task, options.job, options.logs)) for task in told]
        array = array_summary(options.job, tasks)
        print(json.dumps(array, indent=2) if options.json else printable(array_text(array)))
        return 0
    only = told[0] if told else {}
    records = find_records(only, options.job, options.logs)
    if not told and records is None:
        raise UserError(
            f"job {options.job}: Slurm does not know it (any more), and there are no records of it in "
            f"{options.logs or 'logs'}. Fix: --logs FOLDER, where the job's RM_SCALE_LOGS is."
        )
    answer = summarise(only, records)
    print(json.dumps(answer, indent=2) if options.json else printable(as_text(options.job, answer)))
    return 0


def ask_slurm(job: str) -> list[dict[str, str]]:
    """Return what Slurm says of a job, by the names of `scontrol show job`; of an array one entry for each task.

    Tasks that wait are one entry together. What scontrol has forgotten, some minutes after its end, is asked of sacct.
    Empty where Slurm does not know the job, or is not installed.
    """
    answer = _printed(["scontrol", "--oneliner", "show", "job", job])
    found = [dict(re.findall(r"(\w[\w:/]*)=(\S*)", line)) for line in answer.splitlines()]
    found = [entry for entry in found if "JobId" in entry]
    if not found or is_array(job, found):
        known = {entry["JobId"] for entry in found}
        found += [entry for entry in _accounted(job) if entry["JobId"] not in known]
    return sorted(found, key=_task_order)


def _accounted(job: str) -> list[dict[str, str]]:
    """Return what sacct says of a job and its array's tasks, by scontrol's names; nothing where none is kept."""
    names = ("JobID", "JobIDRaw", "JobName", "State", "NodeList", "Elapsed", "Timelimit", "ExitCode", "WorkDir")
    command = ["sacct", "--allocations", "--noheader", "--parsable2", "--jobs", job, "--format", ",".join(names)]
    ours = ("JobId", "JobName", "JobState", "NodeList", "RunTime", "TimeLimit", "ExitCode", "WorkDir")
    found = []
    for line in _printed(command).splitlines():
        name, *values = line.split("|")
        if len(values) != len(ours):
            continue
        entry = dict(zip(ours, values, strict=True))
        entry["JobState"] = entry["JobState"].partition(" ")[0]  # such as "CANCELLED by 1000"
        array, underline, task = name.partition("_")
        if underline:
            entry |= {"ArrayJobId": array, "ArrayTaskId": task.strip("[]")}
        found.append({key: value for key, value in entry.items() if value not in {"", "None assigned", "Unknown"}})
    return [entry for entry in found if "JobId" in entry]


def _printed(command: Sequence[str]) -> str:
    """Return what one of Slurm's commands prints; nothing where it is not there, fails or does not answer."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def find_records(told: Mapping[str, str], job: str, logs: str | None) -> JobRecords | None:
    """Return the records in the job's folder; `None` without one.

    It is looked for below `logs`, else below the site's RM_SCALE_LOGS, in the folder where the job was submitted. The
    folder of an array's task has the task's own number.
    """
    if "," in told.get("ArrayTaskId", "") or "-" in told.get("ArrayTaskId", ""):
        return None  # tasks that wait: the number is that of the whole array, which its last task keeps
    name = logs or site_variables().get("RM_SCALE_LOGS", "logs")
    numbers = [told.get("JobId", job), job]
    if "ArrayTaskId" in told:
        numbers = [told["JobId"], f"{told.get('ArrayJobId', '')}_{told['ArrayTaskId']}"]
    for base in (told.get("WorkDir", "."), "."):
        for number in numbers:
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
        "attempts": max((as_whole(event.get("attempt")) or 0 for event in records.events), default=0) + 1,
        **progress(records),
        **restart_times(records),
        "ends": [f"{node}: {end['reason']}" for node, end in records.ends.items() if end.get("reason")],
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
    steps = [line for line in records.metrics if "loss" in line and as_whole(line.get("step")) is not None]
    if not steps:
        return {"step": None, "total_steps": records.total_steps}
    answer: dict[str, Any] = {"step": int(steps[-1]["step"]), "total_steps": records.total_steps}
    recent = steps[-_RECENT_STEPS:]
    for name in ("loss", "accuracy"):
        if (value := as_number(recent[-1].get(name))) is not None:
            answer[name] = value
    for name in ("pairs_per_second", "real_tokens_per_second"):
        values = [value for line in recent if (value := as_number(line.get(name))) is not None]
        if values:
            answer[name] = sum(values) / len(values)
    step_seconds = _step_seconds(recent)
    if step_seconds is not None:
        answer["step_seconds"] = step_seconds
        if records.total_steps and math.isfinite(records.total_steps * step_seconds):
            answer["eta_seconds"] = max(0, records.total_steps - answer["step"]) * step_seconds
    return answer


def _step_seconds(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean time of a step; each logged line covers the steps since the line before, at its rate."""
    seconds, count = 0.0, 0
    for earlier, line in pairwise(lines):
        steps = int(line["step"]) - int(earlier["step"])
        pairs, rate = as_number(line.get("num_pairs")), as_number(line.get("pairs_per_second"))
        if steps > 0 and pairs and rate and pairs > 0 and rate > 0:
            seconds += pairs / rate
            count += steps
    return seconds / count if count and math.isfinite(seconds) else None


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
            attempt, moment = as_whole(event.get("restart_count", event.get("attempt"))), as_number(event.get("time"))
            if attempt is not None and moment is not None:
                found.setdefault(attempt, moment)
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
    left = answer.get("eta_seconds", 0)
    if state in {"RUNNING", "PENDING", "COMPLETING", ""} and 0 < left < _LONGEST_SECONDS:
        end = time.strftime("%F %H:%M", time.localtime(time.time() + left))
        parts.append(f"{left / 3600:.1f} h of training left, until {end} without a pause")
    return [", ".join(parts)]


# --- Arrays ----------------------------------------------------------------------------------------------------------


def is_array(job: str, told: Sequence[Mapping[str, str]]) -> bool:
    """Tell whether a number is that of a whole array, and not of one task."""
    return "_" not in job and any(entry.get("ArrayJobId") == job for entry in told)


def _task_order(told: Mapping[str, str]) -> tuple[int, str]:
    first = re.match(r"\d+", told.get("ArrayTaskId", ""))
    return (int(first[0]) if first else -1, told["JobId"])


def task_summary(told: Mapping[str, str], records: JobRecords | None) -> dict[str, Any]:
    """Return what is known of one task of an array, or of those that wait together."""
    tasks = told.get("ArrayTaskId", "?")
    name = f"{told['ArrayJobId']}_{tasks if tasks.isdigit() else f'[{tasks}]'}"
    return {"task": name, "count": num_tasks(tasks), "job_id": told["JobId"], **summarise(told, records)}


def num_tasks(text: str) -> int:
    """Return how many tasks Slurm's short form stands for, such as `4-7,10-20:5%2`."""
    count = 0
    for part in text.partition("%")[0].split(","):
        found = re.fullmatch(r"(\d{1,9})(-(\d{1,9})(:([1-9]\d{0,8}))?)?", part, re.ASCII)
        if found is None:
            count += 1
        else:
            count += len(range(int(found[1]), int(found[3] or found[1]) + 1, int(found[5] or 1)))
    return count


def array_summary(job: str, tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return an array's tasks, and how many are in which state."""
    states: dict[str, int] = {}
    for task in tasks:
        state = task["slurm"].get("state", "?")
        states[state] = states.get(state, 0) + task["count"]
    return {"array": job, "states": states, "tasks": list(tasks)}


def array_text(array: Mapping[str, Any]) -> str:
    """Return one line for each task, and one for all."""
    tasks = array["tasks"]
    width = max(len(task["task"]) for task in tasks)
    names = {task["slurm"].get("name", "") for task in tasks}
    states = ", ".join(f"{count} {state}" for state, count in array["states"].items())
    head = f"job {array['array']} {' '.join(sorted(names))}: array of {sum(array['states'].values())} tasks: {states}"
    lines = [f"{task['task']:<{width}}  {_task_line(task)}" for task in tasks]
    return "\n".join([head, *lines, f"one of them in full: rm-scale slurm status {array['array']}_N"])


def _task_line(task: Mapping[str, Any]) -> str:
    slurm = task["slurm"]
    told = str(slurm.get("state", "?"))
    if slurm.get("reason", "None") != "None":
        told += f" ({slurm['reason']})"
    if "nodes" in slurm:
        told += f" on {slurm['nodes']}"
    if slurm.get("exit_code", "0:0") != "0:0":
        told += f", exit code {slurm['exit_code']}"
    if "logs" not in task:
        return told
    total = f" of {task['total_steps']:,}" if task.get("total_steps") else ""
    step = f"step {task['step']:,}{total}" if task.get("step") is not None else "no step logged yet"
    loss = f", loss {task['loss']:.4f}" if "loss" in task else ""
    return f"{told}, attempt {task['attempts']}: {step}{loss}"

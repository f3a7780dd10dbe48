"""What a job left on disk: its attempts, how nodes ended, and the run's own records. `status` reads them only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.files import read_json_lines, read_json_object
from rm_scale.json_values import as_number, as_whole
from rm_scale.slurm.job_start import START_FILE, Start, read_start
from rm_scale.slurm.requeue import read_ends
from rm_scale.training.attempts import read_attempts

_NUM_LAST_BYTES = 65536
_ERROR_WORDS = (
    "error",
    "exception",
    "traceback",
    "out of memory",
    "killed",
    "rm_scale:",
    "rm_scale (rank",
    "timed out",
)


@dataclass(frozen=True)
class JobRecords:
    """A job's folder and its run's.

    Attributes:
        folder: logs of the job.
        starts: what each attempt was started with, by its number; an attempt that was refused has none.
        events: of the job's script, in order.
        attempts: of the training (`run/attempts.jsonl`), in order.
        metrics: logged steps.
        total_steps: that the run will make; `None` while unknown.
        ends: how each node ended in the last attempt.
    """

    folder: Path
    starts: dict[int, Start]
    events: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    total_steps: int | None
    ends: dict[str, dict[str, Any]]

    @property
    def last(self) -> Start | None:
        """The last attempt that was started."""
        return self.starts[max(self.starts)] if self.starts else None


def read_records(folder: Path) -> JobRecords:
    """All of a job's records; what is missing or broken is empty."""
    starts = {}
    for path in folder.glob(f"attempt-*/{START_FILE}"):
        try:
            start = read_start(path)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if _is_sound(start):
            starts[start.attempt] = start
    last = starts[max(starts)] if starts else None
    run = Path(last.output_dir) / "run" if last is not None else None
    ours = [event for event in read_attempts(run) if _of_job(event, last)] if run is not None else []
    return JobRecords(
        folder=folder,
        starts=starts,
        events=read_json_lines(folder / "events.jsonl"),
        attempts=ours,
        metrics=read_json_lines(run / "metrics.jsonl") if run is not None else [],
        total_steps=_total_steps(run),
        ends=read_ends(Path(last.folder)) if last is not None else {},
    )


def _is_sound(start: Start) -> bool:
    """Tell whether what is used here of a start is of the right kind: a file may have been edited, or half written."""
    paths = (start.output_dir, start.folder)
    counts = (start.attempt, start.ranks_per_node)
    return all(isinstance(path, str) and "\0" not in path for path in paths) and all(
        as_whole(count) is not None for count in counts
    )


def _of_job(event: dict[str, Any], start: Start | None) -> bool:
    """Return whether a job wrote an event: several jobs may have used the output directory, one after the other."""
    return start is None or str(event.get("job_id", start.job_id)) == str(start.job_id)


def _total_steps(run: Path | None) -> int | None:
    return as_whole(read_json_object(run / "plan.json").get("total_steps")) if run is not None else None


def last_errors(records: JobRecords, num_lines: int = 8) -> list[str]:
    """Return the last lines that look like errors, of the rank that failed first where it is known."""
    last = records.last
    if last is None:
        return []
    failed = sorted((time, node) for node, end in records.ends.items() if (time := as_number(end.get("failed_at"))))
    names = [f"{node}.rank{_first_rank(records.ends[node])}.log" for _, node in failed]
    paths = [Path(last.folder) / name for name in names] + sorted(Path(last.folder).glob("*.log"))
    for path in dict.fromkeys(paths):
        if path.parent != Path(last.folder) or "\0" in path.name:
            continue
        lines = [line for line in _tail(path) if any(word in line.lower() for word in _ERROR_WORDS)]
        if lines:
            return [f"{path.name}: {line.strip()[:300]}" for line in lines[-num_lines:]]
    return []


def _first_rank(end: dict[str, Any]) -> str:
    parts = str(end.get("reason", "")).split()
    return parts[1] if len(parts) > 1 and parts[0] == "rank" else "0"


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _NUM_LAST_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []

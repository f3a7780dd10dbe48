"""What a step of the proof left: a sealed line in `steps.jsonl` the moment it is known, and the table of all of them.

The seal is that of benchmark records (`rm_scale.reporting.benchmarks.sealed_lines`): a checksum over everything but
itself. A rehearsal has a schema of its own, so that its records can't stand among measurements.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rm_scale.reporting.benchmarks.sealed_lines import (
    Entry,
    RecordError,
    checksum,
    put_line,
    read_entries,
    validated,
)

SCHEMA = "rm_scale.gpu_proof/1"
REHEARSAL = "rm_scale.gpu_proof_rehearsal/1"
StepStatus = Literal["ok", "failed", "killed", "skipped", "unfinished"]
FAILURES = frozenset({"failed", "killed", "unfinished"})
FINISHED = frozenset({"ok", "failed", "killed"})
"""A step with such a record is not run again for the same code. What was skipped may have become possible."""

STEPS = "steps.jsonl"
SUMMARY = "summary.md"


class StepRecord(BaseModel):
    """One step: what came of it, its figures, and where it ran."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_name: Literal["rm_scale.gpu_proof/1", "rm_scale.gpu_proof_rehearsal/1"] = Field(alias="schema")
    name: str
    number: int = Field(description="place in the order of the proof")
    title: str
    status: StepStatus = Field(description="unfinished: lost or cut off while it ran; run again")
    reason: str = Field(default="", description="why it failed, was ended or skipped")
    verdict: str = Field(default="", description="its key numbers in a line")
    seconds: float = 0.0
    limit_seconds: float = 0.0
    figures: dict[str, Any] = Field(default_factory=dict)
    code: str = Field(description="digest of what ran, see `benchmarks.gpu_proof.driver.code_digest`")
    commit: str | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    protocol: dict[str, Any] = Field(default_factory=dict, description="date, load of the machine, number of GPUs")
    checksum: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return dict(json.loads(self.model_dump_json(by_alias=True)))

    def sealed(self) -> StepRecord:
        """Return the same with its checksum."""
        return self.model_copy(update={"checksum": checksum(self.as_dict())})


def write_step(record: StepRecord, folder: Path) -> Path:
    """Write a record sealed, in the place of an older one of the same step, flushed to the disk; return the file."""
    file = folder / STEPS
    put_line(file, record.sealed().as_dict(), lambda content: content.get("name") == record.name)
    return file


def read_step(name: str, folder: Path, rehearsal: bool = False) -> StepRecord:
    """Read the record of one step, as it was written.

    Args:
        name: the step's.
        folder: where the proof's records lie.
        rehearsal: what it must be: a rehearsal's, or a measurement's.

    Raises:
        RecordError: it is of the other kind, was edited, is no such record, or is not there.
    """
    for entry in _entries(folder):
        if isinstance(entry.content, dict) and entry.content.get("name") == name:
            return _step_in(entry, rehearsal)
    raise RecordError(f"{folder / STEPS}: no record of {name}. Fix: run the step.")


def read_steps(folder: Path, rehearsal: bool = False) -> tuple[list[StepRecord], list[str]]:
    """Read all records of a folder in the proof's order, and why others were refused. Nothing is left out silently."""
    records, refused = [], []
    for entry in _entries(folder):
        try:
            records.append(_step_in(entry, rehearsal))
        except RecordError as error:
            refused.append(str(error))
    return sorted(records, key=lambda record: record.number), refused


def _entries(folder: Path) -> list[Entry]:
    file = folder / STEPS
    return read_entries(file) if file.is_file() else []


def _step_in(entry: Entry, rehearsal: bool) -> StepRecord:
    content = entry.parsed("the step")
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema == REHEARSAL and not rehearsal:
        raise RecordError(
            f"{entry.place}: is of a rehearsal at small sizes, and no measurement. Fix: take it out of this folder."
        )
    expected = REHEARSAL if rehearsal else SCHEMA
    if schema != expected:
        raise RecordError(
            f"{entry.place}: schema {schema!r}, expected {expected!r}. Fix: run the step again with this version."
        )
    return validated(content, StepRecord, entry.place, "the step")


# --- What may stand in a record --------------------------------------------------------------------------------------

_ABSOLUTE = re.compile(r"(?<![\w.:/-])/(?!sys/|proc/|dev/(?!shm))(?:[\w.@+=-]+/)+([\w.@+=-]*)")


def without_places(value: Any, places: Mapping[str, str]) -> Any:
    """Take folders of this machine out of texts, and leave numbers as JSON takes them.

    Args:
        value: texts, numbers, lists and dictionaries.
        places: folders by what they are called instead, longest first.
    """
    if isinstance(value, dict):
        return {str(key): without_places(item, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item, places) for item in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, str):
        for place, name in places.items():
            value = value.replace(place, name)
        return _ABSOLUTE.sub(r".../\1", value)
    return value


# --- The table -------------------------------------------------------------------------------------------------------


def summary(records: Sequence[StepRecord], refused: Iterable[str] = (), code: str | None = None) -> str:
    """Write Markdown: a line per step, then the longer tables that steps left.

    Args:
        records: in the proof's order.
        refused: why files are not among them.
        code: digest of what runs now; records of other code are marked.
    """
    lines = ["| | step | verdict | s | key numbers |", "|---|---|---|---|---|"]
    for record in records:
        said = record.verdict if record.status == "ok" else "; ".join(filter(None, [record.reason, record.verdict]))
        cell = said.replace("|", "/").replace("\n", " ")
        status = record.status + (" (other code)" if code is not None and record.code != code else "")
        lines.append(f"| {record.number} | {record.title} | {status} | {record.seconds:.0f} | {cell} |")
    lines += ["", *(f"Refused: {text}" for text in refused)]
    for record in records:
        for title, rows in (record.figures.get("tables") or {}).items():
            lines += ["", f"**{record.title}: {title}**", "", *markdown_table(rows)]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of dictionaries with the same keys."""
    if not rows:
        return ["(none)"]
    names = list(rows[0])
    body = ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *body]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value).replace("|", "/").replace("\n", " ")


def write_summary(folder: Path, rehearsal: bool, code: str | None = None) -> str:
    """Write the table beside the records; return its text."""
    records, refused = read_steps(folder, rehearsal)
    head = "Rehearsal at small sizes: nothing here is a measurement.\n\n" if rehearsal else ""
    if records and not rehearsal:
        env = records[-1].environment
        head = (
            f"{records[-1].protocol.get('num_gpus')} x {', '.join(sorted(set(env.get('gpus') or ['no GPU known'])))}, "
            f"torch {env.get('packages', {}).get('torch')}, CUDA {env.get('cuda')}, commit "
            f"{records[-1].commit or 'unknown'}\n\n"
        )
    text = head + summary(records, refused, code)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).write_text(text, encoding="utf-8")
    return text

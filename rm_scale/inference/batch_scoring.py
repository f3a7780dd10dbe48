"""Score a file of any size: in chunks, on any number of ranks, going on where an earlier start was stopped.

Each chunk of rows becomes a part file of its own, written aside and renamed, so that a part is whole or not there.
Ranks take chunks in turn and need nothing from each other but the folder of parts; what is there already is not done
again. The first rank puts the parts together. Part files are the only memory: a kill costs the chunks that were being
scored.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rm_scale.data.groups import RejectedRow
from rm_scale.distributed import World
from rm_scale.errors import DataError
from rm_scale.inference.ensemble import Scored
from rm_scale.inference.rows import RowFile, Scorable, output_suffix, scorable, write_rows
from rm_scale.logs import get_logger
from rm_scale.modeling.contract import CONTRACT_FILE, ScoringContract

logger = get_logger(__name__)

JOB_FILE = "job.json"
_POLL_SECONDS = 0.5
_NUM_EXAMPLES = 5
_WEIGHT_SUFFIXES = (".safetensors",)
_SMALL_FILES = (
    "config.json",
    "adapter_config.json",
    CONTRACT_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class Scores(Protocol):
    """What scores texts: `rm_scale.inference.ensemble.Ensemble`."""

    def score(self, texts: Sequence[Scorable], max_tokens: int) -> list[Scored]:
        """Score texts."""

    def columns(self, scored: Scored) -> dict[str, Any]:
        """The columns a row gets."""


@dataclass(frozen=True)
class ScoringJob:
    """What is to be scored, and how.

    Attributes:
        output: the file to write.
        facts: what decides the scores (input, models, settings): parts of a job with others are not taken.
        chunk_rows: rows of a part.
        max_tokens: tokens per forward pass.
        max_rejected_share: most rows without a score.
        stop_at_bad_row: end at the first row that can't be scored.
        stall_seconds: how long to wait for the next part of another rank.
    """

    output: Path
    facts: Mapping[str, Any]
    chunk_rows: int = 512
    max_tokens: int = 8192
    max_rejected_share: float = 0.05
    stop_at_bad_row: bool = False
    stall_seconds: float = 1800.0

    @property
    def parts_folder(self) -> Path:
        """Where parts lie until the output is whole."""
        return self.output.with_name(f"{self.output.name}.parts")

    def part(self, number: int) -> Path:
        """The file of one chunk."""
        return self.parts_folder / f"part-{number:08d}.jsonl"

    def num_chunks(self, num_rows: int) -> int:
        """Parts that the output is made of."""
        return -(-num_rows // self.chunk_rows)


@dataclass
class ScoringSummary:
    """What became of the rows.

    Attributes:
        num_rows: rows read.
        num_scored: rows with a score.
        problems: rows without one, by reason.
        examples: the first rows of each reason.
    """

    num_rows: int = 0
    num_scored: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Count one row of the output."""
        self.num_rows += 1
        if row.get("score") is not None:
            self.num_scored += 1
            return
        reason, _, detail = str(row.get("error")).partition(": ")
        self.problems[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(f"row {number}" + (f" ({detail})" if detail else ""))

    def lines(self) -> list[str]:
        """For people: one line per reason."""
        return [
            f"{count} rows have no score, {reason}: {'; '.join(self.examples[reason])}"
            for reason, count in self.problems.most_common()
        ]


def model_facts(folder: Path) -> dict[str, Any]:
    """What tells a model from another one: small files by content, weights, its base's too, by size and time."""
    digest = hashlib.sha256()
    for name in _SMALL_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    weights = _weights(folder)
    if (folder / "adapter_config.json").is_file() and (folder / CONTRACT_FILE).is_file():
        weights |= _weights(Path(ScoringContract.load(folder).base_model.name))
    return {"sha256": digest.hexdigest(), "weights": weights}


def _weights(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file; none of a base that is a hub name, which a revision tells apart."""
    files = sorted(file for file in folder.glob("*") if file.suffix in _WEIGHT_SUFFIXES)
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def run_job(
    job: ScoringJob, rows: RowFile, scores: Scores, world: World, progress: Callable[[int], None] | None = None
) -> ScoringSummary | None:
    """Score this rank's chunks; on rank 0 then wait for the others', and write the output.

    Args:
        job: what to do.
        rows: the input.
        scores: the models.
        world: this rank's place.
        progress: told how many rows have been scored so far by all ranks.

    Returns:
        What became of the rows, on rank 0.

    Raises:
        DataError: the output can't be written, parts of another job are in the way, or too many rows have no score.
    """
    output_suffix(job.output)
    open_parts(job, world)
    chunks = job.num_chunks(len(rows))
    shown = -math.inf
    for number in range(world.rank, chunks, world.size):
        if not job.part(number).exists():
            _score_chunk(job, number, rows, scores)
        # Counting parts is not free where there are many.
        if progress is not None and time.monotonic() - shown > _POLL_SECONDS:
            progress(_rows_done(job, chunks, len(rows)))
            shown = time.monotonic()
    if not world.is_main:
        return None
    _wait_for_parts(job, chunks, len(rows), progress)
    if progress is not None:
        progress(len(rows))
    return _put_together(job, chunks, len(rows))


def open_parts(job: ScoringJob, world: World) -> None:
    """Make the folder of parts, or find in it what was begun.

    Raises:
        DataError: it holds parts of another job.
    """
    record = job.parts_folder / JOB_FILE
    facts = json.loads(json.dumps({**job.facts, "chunk_rows": job.chunk_rows}))
    if world.is_main:
        job.parts_folder.mkdir(exist_ok=True)
        if not record.exists():
            aside = record.with_suffix(".writing")
            aside.write_text(json.dumps(facts, indent=2), encoding="utf-8")
            os.replace(aside, record)
    started = time.monotonic()
    while not record.exists():
        if time.monotonic() - started > job.stall_seconds:
            raise DataError(
                f"{record}: rank 0 has not made it in {job.stall_seconds:g} s. Fix: put the output on a disk that all "
                "ranks see."
            )
        time.sleep(_POLL_SECONDS)
    begun = json.loads(record.read_text(encoding="utf-8"))
    different = sorted(name for name in {*begun, *facts} if begun.get(name) != facts.get(name))
    if different:
        raise DataError(
            f"{job.parts_folder}: holds parts that were scored with other {', '.join(different)}. Fix: start it as it "
            "was begun, or begin anew with --restart."
        )
    found = sum(1 for _ in job.parts_folder.glob("part-*.jsonl"))
    if found and world.is_main:
        logger.info(f"{job.parts_folder}: {found} parts of {job.chunk_rows} rows are there already")


def forget_parts(job: ScoringJob) -> None:
    """Remove what an earlier start has left."""
    shutil.rmtree(job.parts_folder, ignore_errors=True)


def _score_chunk(job: ScoringJob, number: int, rows: RowFile, scores: Scores) -> None:
    start = number * job.chunk_rows
    found = score_rows(rows.read(start, start + job.chunk_rows), scores, job)
    if job.stop_at_bad_row:
        _require_scores(rows.name, start, found)
    lines = [json.dumps(row, ensure_ascii=False) for row in found]
    part = job.part(number)
    aside = part.with_name(f".{part.name}.{os.getpid()}.writing")
    aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(aside, part)


def _require_scores(name: str, start: int, found: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(found, start):
        if row["score"] is None:
            raise DataError(
                f"{name}, row {number}: {row['error']}. Fix: mend the row, or --on_bad_row null to get it back with "
                "that as its error."
            )


def score_rows(rows: Sequence[tuple[int, Any]], scores: Scores, job: ScoringJob) -> list[dict[str, Any]]:
    """The rows with their scores, in order; what can't be scored has `score` null and `error`."""
    texts: list[Scorable] = []
    problems: dict[int, str] = {}
    places: list[int] = []
    for place, (_, row) in enumerate(rows):
        try:
            texts.append(scorable(row))
            places.append(place)
        except RejectedRow as rejected:
            problems[place] = str(rejected)
    found = dict(zip(places, scores.score(texts, job.max_tokens), strict=True)) if texts else {}
    results = []
    for place, (_, row) in enumerate(rows):
        scored = found.get(place) or Scored(problem=problems[place])
        results.append({**_own_columns(row), **scores.columns(scored)})
    return results


def _own_columns(row: Any) -> dict[str, Any]:
    """What the row held; a row that could not be read holds nothing."""
    return {str(name): _plain(value) for name, value in row.items()} if isinstance(row, Mapping) else {}


def _plain(value: Any) -> Any:
    """As JSON can hold it: tables have dates, bytes and numbers of their own."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _rows_done(job: ScoringJob, chunks: int, num_rows: int) -> int:
    done = sum(1 for _ in job.parts_folder.glob("part-*.jsonl"))
    return num_rows if done >= chunks else done * job.chunk_rows


def _wait_for_parts(job: ScoringJob, chunks: int, num_rows: int, progress: Callable[[int], None] | None) -> None:
    """Wait for the other ranks. Their launcher ends this one too when one of them dies."""
    missing, since = chunks + 1, time.monotonic()
    while True:
        absent = [number for number in range(chunks) if not job.part(number).exists()]
        if not absent:
            return
        if len(absent) < missing:
            missing, since = len(absent), time.monotonic()
        if time.monotonic() - since > job.stall_seconds:
            raise DataError(
                f"{job.parts_folder}: {len(absent)} of {chunks} parts are missing, first {job.part(absent[0]).name}, "
                f"and none came in {job.stall_seconds:g} s. Fix: start it again, it goes on from what is there."
            )
        if progress is not None:
            progress(_rows_done(job, chunks, num_rows))
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class _Part:
    """The rows of a part, read anew each time."""

    path: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)


def _put_together(job: ScoringJob, chunks: int, num_rows: int) -> ScoringSummary:
    parts = [_Part(job.part(number)) for number in range(chunks)]
    summary = ScoringSummary()
    for part in parts:
        for row in part:
            summary.add(summary.num_rows, row)
    assert summary.num_rows == num_rows, "every input row comes back once"
    lost = summary.num_rows - summary.num_scored
    if lost > job.max_rejected_share * max(1, num_rows):
        share = min(1.0, -(-100 * lost // num_rows) / 100)
        raise DataError(
            f"{lost} of {num_rows} rows have no score, and --max_rejected_share is {job.max_rejected_share:g}; nothing "
            "was written.\n  " + "\n  ".join(summary.lines()) + "\nFix: mend them; or take them as they are with "
            f"--max_rejected_share {share:g}, which only puts together what has been scored."
        )
    write_rows(parts, job.output)
    forget_parts(job)
    return summary

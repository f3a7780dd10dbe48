"""Score a file of any size: in chunks, on any number of ranks, going on where an earlier start was stopped.

Each chunk of rows becomes a part file of its own, written aside and renamed, so that a part is whole or not there.
Ranks take chunks in turn and need nothing from each other but the folder of parts; what is there already is not done
again. The first rank puts the parts together. Part files are the only memory: a kill costs the chunks that were being
scored. Texts that the device's memory doesn't suffice for are computed in halves, and later ones fewer at once.

Rounding depends on what is computed together. So chunks are whole blocks of rows, and texts of different blocks are
never in one batch: a score is the same to the bit whatever the chunks, the ranks or an interruption. Rows with the same
tokens get the score of the first of them when the parts are put together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.distributed import World
from rm_scale.errors import DataError
from rm_scale.files import read_json_object, write_whole
from rm_scale.inference.scoring.ensemble import Scored
from rm_scale.inference.scoring.out_of_memory_retry import TokenBudget
from rm_scale.inference.scoring.row_files import RowFile, Scorable, output_suffix, scorable, write_rows
from rm_scale.logs import get_logger
from rm_scale.modeling.scoring_contract import CONTRACT_FILE, ScoringContract
from rm_scale.output_lock import LOCK_FILE, writing_alone

logger = get_logger(__name__)

JOB_FILE = "job.json"
BLOCK_ROWS = 64
"""Texts of more rows are not computed together: enough to fill a batch, and few enough to leave chunks small."""
_PART_FORM = 2
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
    """What scores texts: `rm_scale.inference.scoring.ensemble.Ensemble`."""

    def score(self, texts: Sequence[Scorable], max_tokens: int) -> list[Scored]:
        """Score texts."""

    def columns(self, scored: Scored) -> dict[str, Any]:
        """Return the columns a row gets."""


@dataclass(frozen=True)
class ScoringJob:
    """What is to be scored, and how.

    Attributes:
        output: the file to write.
        facts: what decides the scores (input, models, settings): parts of a job with others are not taken.
        chunk_rows: rows of a part, rounded up to whole blocks.
        block_rows: rows whose texts may share a batch.
        max_tokens: tokens per forward pass, as long as memory suffices.
        max_rejected_share: most rows without a score.
        stop_at_bad_row: end at the first row that can't be scored.
        stall_seconds: how long to wait for the next part of another rank.
    """

    output: Path
    facts: Mapping[str, Any]
    chunk_rows: int = 512
    block_rows: int = BLOCK_ROWS
    max_tokens: int = 8192
    max_rejected_share: float = 0.05
    stop_at_bad_row: bool = False
    stall_seconds: float = 1800.0

    @property
    def parts_folder(self) -> Path:
        """Where parts lie until the output is whole."""
        return self.output.with_name(f"{self.output.name}.parts")

    def part(self, number: int) -> Path:
        """Return the file of one chunk."""
        return self.parts_folder / f"part-{number:08d}.jsonl"

    @property
    def part_rows(self) -> int:
        """Rows of a part: whole blocks."""
        return -(-self.chunk_rows // self.block_rows) * self.block_rows

    def num_chunks(self, num_rows: int) -> int:
        """Return the number of chunks that the output is made of."""
        return -(-num_rows // self.part_rows)


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
        """Return one line for people per reason."""
        return [
            f"{count} rows have no score, {reason}: {'; '.join(self.examples[reason])}"
            for reason, count in self.problems.most_common()
        ]


def model_facts(folder: Path) -> dict[str, Any]:
    """Return what tells a model from another one: small files by content, weights and base by size and time."""
    digest = hashlib.sha256()
    for name in _SMALL_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    weights = _weights(folder)
    if (folder / "adapter_config.json").is_file() and (folder / CONTRACT_FILE).is_file():
        weights |= _weights(Path(ScoringContract.load(folder).base_model.name))
    return {"sha256": digest.hexdigest(), "weights": weights}


def _weights(folder: Path) -> dict[str, list[int]]:
    """Return size and time of each file; none of a base that is a hub name, which a revision tells apart."""
    files = sorted(file for file in folder.glob("*") if file.suffix in _WEIGHT_SUFFIXES)
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


@contextlib.contextmanager
def parts_held(job: ScoringJob, world: World) -> Iterator[None]:
    """Let one start at a time work in the folder of parts while the block runs: rank 0 holds its lock.

    The lock of a start that was killed is taken over.

    Raises:
        DataError: the folder holds what is not ours.
        UserError: another start works there.
    """
    if not world.is_main:
        yield
        return
    _require_own(job)
    with writing_alone(job.parts_folder, "output"):
        yield
    with contextlib.suppress(OSError):  # parts are left when the block has failed
        job.parts_folder.rmdir()


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
    budget = TokenBudget(job.max_tokens)
    shown = -math.inf
    for number in range(world.rank, chunks, world.size):
        if not job.part(number).exists():
            _score_chunk(job, number, rows, scores, budget)
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
        DataError: it holds parts of another job, or what is not ours.
    """
    record = job.parts_folder / JOB_FILE
    facts = json.loads(json.dumps({**job.facts, "chunk_rows": job.part_rows, "part_form": _PART_FORM}))
    if world.is_main:
        _require_own(job)
        job.parts_folder.mkdir(exist_ok=True)
        if not record.exists():
            write_whole(record, json.dumps(facts, indent=2))
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
        logger.info(f"{job.parts_folder}: {found} parts of {job.part_rows} rows are there already")


_BEFORE_THE_RECORD = re.compile(rf"{re.escape(LOCK_FILE)}.*|\.{re.escape(JOB_FILE)}\.[0-9a-f]{{8}}\.writing")
_OUR_FILES = re.compile(r"job\.json|part-\d{8}\.jsonl|\.(job\.json|part-\d{8}\.jsonl)\.[0-9a-f]{8}\.writing")


def _require_own(job: ScoringJob) -> None:
    """Refuse a folder of parts that holds anything we did not write.

    Raises:
        DataError: names the first of it.
    """
    folder = job.parts_folder
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise DataError(f"{folder}: is no folder, and parts of the output go there. Fix: another --output.")
    try:
        names = sorted(path.name for path in folder.iterdir() if not _BEFORE_THE_RECORD.fullmatch(path.name))
    except FileNotFoundError:  # another start has just finished
        return
    begun = read_json_object(folder / JOB_FILE)
    is_ours = not names or {"chunk_rows", *job.facts} <= begun.keys()
    foreign = next((name for name in names if not is_ours or not _OUR_FILES.fullmatch(name)), None)
    if foreign is not None:
        raise DataError(
            f"{folder}: holds {foreign}, which no scoring job wrote; parts of the output go there. Fix: another "
            "--output, or move it away."
        )


def forget_parts(job: ScoringJob) -> None:
    """Remove what an earlier start has left, and nothing else.

    Raises:
        DataError: the folder of parts holds what is not ours.
    """
    _require_own(job)
    _remove_own(job)


def _remove_own(job: ScoringJob) -> None:
    """Remove the files of a scoring job, its record last, and the folder when nothing else is in it."""
    names = sorted((path.name for path in job.parts_folder.glob("*")), key=lambda name: name == JOB_FILE)
    for name in names:
        if _OUR_FILES.fullmatch(name):
            (job.parts_folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody has put a file there meanwhile
        job.parts_folder.rmdir()


def _score_chunk(job: ScoringJob, number: int, rows: RowFile, scores: Scores, budget: TokenBudget) -> None:
    start = number * job.part_rows
    found: list[_ScoredRow] = []
    for first in range(start, start + job.part_rows, job.block_rows):
        found += _score_block(rows.read(first, first + job.block_rows), scores, budget)
    if job.stop_at_bad_row:
        _require_scores(rows.name, start, [columns for _, columns, _ in found])
    try:
        write_whole(job.part(number), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    except FileNotFoundError as error:
        raise DataError(
            f"{job.parts_folder}: is gone, and parts of the output go there: rank 0 has ended, or somebody removed it. "
            "Fix: look at what rank 0 said, then start it again."
        ) from error


def _require_scores(name: str, start: int, found: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(found, start):
        if row["score"] is None:
            raise DataError(
                f"{name}, row {number}: {row['error']}. Fix: mend the row, or --on_bad_row null to get it back with "
                "that as its error."
            )


def score_rows(
    rows: Sequence[tuple[int, Any]], scores: Scores, job: ScoringJob, budget: TokenBudget | None = None
) -> list[dict[str, Any]]:
    """Yield the rows with their scores, in order; what can't be scored has `score` null and `error`.

    Args:
        rows: number and content of each.
        scores: the models.
        job: how they are scored.
        budget: tokens per forward pass, which it lowers when memory runs out; default the job's.
    """
    budget = budget or TokenBudget(job.max_tokens)
    blocks = [rows[start : start + job.block_rows] for start in range(0, len(rows), job.block_rows)]
    first = _FirstColumns()
    scored = [row for block in blocks for row in _score_block(block, scores, budget)]
    return [{**own, **first.of(columns, key)} for own, columns, key in scored]


_ScoredRow = tuple[dict[str, Any], dict[str, Any], str | None]
"""What a row held, the columns that it got, and what it has in common with rows of the same tokens."""


def _score_block(rows: Sequence[tuple[int, Any]], scores: Scores, budget: TokenBudget) -> list[_ScoredRow]:
    texts: list[Scorable] = []
    problems: dict[int, str] = {}
    places: list[int] = []
    for place, (_, row) in enumerate(rows):
        try:
            texts.append(scorable(row))
            places.append(place)
        except RejectedRow as rejected:
            problems[place] = str(rejected)
    scored = budget.score(texts, scores.score, _approximate_tokens) if texts else []
    found = {place: one or Scored(problem=_TOO_LARGE) for place, one in zip(places, scored, strict=True)}
    results = []
    for place, (_, row) in enumerate(rows):
        one = found.get(place) or Scored(problem=problems[place])
        results.append((_own_columns(row), scores.columns(one), one.key))
    return results


class _FirstColumns:
    """The columns of the first row with each key. Of very many, those met longest ago are forgotten: always the same.

    The texts of different blocks are computed apart, so that equal ones may differ in their last digits.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def of(self, columns: dict[str, Any], key: str | None) -> dict[str, Any]:
        """Return what a row with these columns and this key gets."""
        if key is None:
            return columns
        found = self._known.setdefault(key, columns)
        self._known.move_to_end(key)
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return found


_MOST_KNOWN = 200_000
_TOO_LARGE = "out_of_memory: it does not fit the device's memory, not even alone; with more of it: --restart"
_BYTES_PER_TOKEN = 4


def _approximate_tokens(texts: Sequence[Scorable]) -> int:
    """Return about how many tokens texts have, by their size: enough to choose how many to compute at once."""
    parts = [part for text in texts for part in (text.prompt, text.completion, text.tools, text.text) if part]
    return sum(len(str(part).encode(errors="replace")) for part in parts) // _BYTES_PER_TOKEN


def _own_columns(row: Any) -> dict[str, Any]:
    """Return what the row held; a row that could not be read holds nothing."""
    return {str(name): _plain(value) for name, value in row.items()} if isinstance(row, Mapping) else {}


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: tables have dates, bytes and numbers of their own."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _rows_done(job: ScoringJob, chunks: int, num_rows: int) -> int:
    done = sum(1 for _ in job.parts_folder.glob("part-*.jsonl"))
    return num_rows if done >= chunks else done * job.part_rows


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


class _Part:
    """The rows of a part, read anew each time.

    Args:
        path: its file.
        first: columns of the rows before it; a row with the tokens of one of them gets its columns.
    """

    def __init__(self, path: Path, first: _FirstColumns) -> None:
        self.path = path
        self._replaced: dict[int, dict[str, Any]] = {}
        for number, (_, columns, key) in enumerate(self._read()):
            found = first.of(columns, key)
            if found != columns:
                self._replaced[number] = found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, (own, columns, _) in enumerate(self._read()):
            yield {**own, **self._replaced.get(number, columns)}

    def _read(self) -> Iterator[_ScoredRow]:
        with self.path.open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)


def _put_together(job: ScoringJob, chunks: int, num_rows: int) -> ScoringSummary:
    first = _FirstColumns()
    parts = [_Part(job.part(number), first) for number in range(chunks)]
    summary = ScoringSummary()
    for part in parts:
        for row in part:
            summary.add(summary.num_rows, row)
    assert summary.num_rows == num_rows, "every input row comes back once"
    lost = summary.num_rows - summary.num_scored
    if lost > job.max_rejected_share * max(1, num_rows):
        share = min(1.0, -(-100 * lost // num_rows) / 100)
        accept = f"; or take them as they are with --max_rejected_share {share:g}, which puts together what is scored."
        accept = accept if summary.num_scored else "."
        raise DataError(
            f"{lost} of {num_rows} rows have no score, and --max_rejected_share is {job.max_rejected_share:g}; nothing "
            "was written.\n  " + "\n  ".join(summary.lines()) + "\nFix: mend them" + accept
        )
    write_rows(parts, job.output)
    _remove_own(job)
    return summary

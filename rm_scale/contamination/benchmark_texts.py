"""Read the prompts and responses of a file that training data is held against, whatever kind of file it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.contamination.row_texts import RowTexts
from rm_scale.contamination.source_rows import SourceRows
from rm_scale.data.conversations import as_text
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import first_present
from rm_scale.data.sources import RawRows, Source, local_sources
from rm_scale.errors import DataError
from rm_scale.evaluation.benchmarks.benchmark_files import benchmark_of_row, read_benchmark_rows
from rm_scale.texts import some_names

# Of files that hold no preferences: questions, with or without one answer.
PROMPT_COLUMNS = ("prompt", "question", "instruction", "problem", "query", "messages", "text")
RESPONSE_COLUMNS = ("completion", "response", "answer", "output", "solution")
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class BenchmarkTexts:
    """The texts of one file.

    Attributes:
        name: the path as given.
        format: what it was read as.
        num_rows: its rows.
        rows: those that can be read.
    """

    name: str
    format: str
    num_rows: int
    rows: tuple[RowTexts, ...]


def read_benchmark_texts(path: str) -> list[BenchmarkTexts]:
    """Read a file, or the files of a pattern.

    A file is read as a benchmark that `rm-scale eval` knows, else as preferences in any format that training reads,
    else as questions: rows with one of `PROMPT_COLUMNS` and perhaps one of `RESPONSE_COLUMNS`.

    Raises:
        DataError: a file is missing, can't be read, or is none of these.
    """
    return [_read(source) for source in local_sources([path], "test")]


def _read(source: Source) -> BenchmarkTexts:
    with tempfile.TemporaryDirectory(prefix="rm_scale_against_") as work:
        raw = source.load(Path(work))
        first = raw.sample()[0]
        found = _as_benchmark(source.name, first) or _as_preferences(source) or _as_questions(source.name, raw, first)
    if not found.rows:
        raise DataError(
            f"{source.name}: none of its {found.num_rows:,} rows can be read as {found.format}. Fix: look at its first "
            "rows; rm-scale data --dataset_path of the same file says what is wrong with each."
        )
    return found


def _as_benchmark(name: str, first: Mapping[str, Any]) -> BenchmarkTexts | None:
    format = benchmark_of_row(first)
    if format is None:
        return None
    try:
        items = read_benchmark_rows(name, format)
    except DataError:
        return None  # it only looks like one: preferences may have a column "subset" too
    rows = tuple(RowTexts.of(number, item.prompt, item.completions) for number, item in items)
    return BenchmarkTexts(name, format, len(rows), rows)


def _as_preferences(source: Source) -> BenchmarkTexts | None:
    with tempfile.TemporaryDirectory(prefix="rm_scale_against_") as work:
        try:
            groups = SourceRows.open(source, Path(work))
        except DataError:
            return None
        return BenchmarkTexts(source.name, groups.reader.format, len(groups), tuple(texts_of_groups(groups)))


def texts_of_groups(groups: SourceRows) -> Iterator[RowTexts]:
    """Yield the texts of the rows that can be read."""
    for row, group in groups:
        if isinstance(group, PreferenceGroup):
            yield RowTexts.of(row, group.prompt, group.responses)


def _as_questions(name: str, raw: RawRows, first: Mapping[str, Any]) -> BenchmarkTexts:
    try:
        column = first_present(first, PROMPT_COLUMNS)
    except RejectedRow:
        raise DataError(
            f"{name}: is no benchmark or preference file that is known here, and its rows have none of the columns "
            f"{', '.join(PROMPT_COLUMNS)}, but {some_names(first)}. Fix: rename the column of the questions to prompt."
        ) from None
    rows = []
    for start in range(0, len(raw.dataset), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(raw.dataset))
        for number, row in raw.decode(raw.dataset[start:stop], range(start, stop)):
            texts = _question(number, row, column)
            rows += [texts] if texts is not None else []
    return BenchmarkTexts(name, f"questions in column {column}", len(raw.dataset), tuple(rows))


def _question(number: int, row: Any, column: str) -> RowTexts | None:
    if not isinstance(row, Mapping) or row.get(column) is None:
        return None
    try:
        prompt = as_text(row[column], column)
        answers = [as_text(row[name], name) for name in RESPONSE_COLUMNS if isinstance(row.get(name), str | list)]
    except RejectedRow:
        return None
    return RowTexts.of(number, prompt, answers[:1])

"""Turn columns of scores into scored groups: every row is used, or counted under a named reason with its number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rm_scale.batching.group_pairs import group_pairs
from rm_scale.data.data_report import NUM_FIRST_ROWS
from rm_scale.data.rejected_rows import REJECTION_REASONS, RejectedRow
from rm_scale.errors import DataError
from rm_scale.evaluation.evaluate import ScoredModel
from rm_scale.evaluation.evaluation_document import DataUse
from rm_scale.evaluation.score_columns.group_texts import preference_reader, row_keys
from rm_scale.evaluation.score_columns.long_rows import group_rows, long_layout
from rm_scale.evaluation.score_columns.published_results import compare_with_published
from rm_scale.evaluation.score_columns.result_rows import ResultRow, read_result_rows
from rm_scale.evaluation.score_columns.score_labels import Label, LabelReader, label_reader
from rm_scale.evaluation.score_columns.score_values import (
    SCORE_REASONS,
    ScoreColumns,
    UnusableScores,
    first_problem,
    score_columns,
)
from rm_scale.evaluation.scores_file import hash_text
from rm_scale.logs import get_logger
from rm_scale.training.pair_counts import ScoredGroup

logger = get_logger(__name__)

_MEANINGS = {**REJECTION_REASONS, **SCORE_REASONS}
_SAMPLE = 200


@dataclass(frozen=True)
class ColumnRequest:
    """Which scores of which files.

    Attributes:
        words: what `--score_column` says; none for the columns' known names.
        label_column: where the right answer is; `None` looks for it.
        group_column: of a long file, what its rows of one prompt have in common; `None` looks for it.
        subset_column: names a row's subset.
        max_groups: only the first so many rows or groups; `None` for all.
        max_rejected_share: stop when a larger share of the rows can't be used.
        ignore_columns: that are not read, so that none of them is taken for labels.
    """

    words: Sequence[str] = ()
    label_column: str | None = None
    group_column: str | None = None
    subset_column: str = "subset"
    max_groups: int | None = None
    max_rejected_share: float = 0.05
    ignore_columns: Sequence[str] = ()


@dataclass
class _Found:
    """What was read of one set of scores, in the order of the rows."""

    groups: list[ScoredGroup] = field(default_factory=list)
    rows: list[ResultRow] = field(default_factory=list)
    refused: list[tuple[ResultRow, UnusableScores]] = field(default_factory=list)


def read_column_scores(paths: Sequence[str], request: ColumnRequest) -> list[ScoredModel]:
    """Read the sets of scores that files hold; each is called like its columns.

    Args:
        paths: files with the same columns; see `read_result_rows`.
        request: which columns, and how they are read.

    Raises:
        DataError: a column is not there, or too many rows can't be used.
    """
    rows = read_result_rows(paths)
    name = ", ".join(paths)
    sample = [row.value for row in rows if isinstance(row.value, Mapping)][:_SAMPLE]
    if not sample:
        raise DataError(f"{name}: no row is an object with columns; the first is {rows[0].value}. Fix: check the file.")
    sets = score_columns(request.words, sample, name)
    ignored = tuple(dict.fromkeys([*(root for one in sets for root in one.roots), *request.ignore_columns]))
    return [_read_set(columns, rows, sample, ignored, name, request) for columns in sets]


def _read_set(
    columns: ScoreColumns,
    rows: Sequence[ResultRow],
    sample: Sequence[Mapping[str, Any]],
    ignored: Sequence[str],
    name: str,
    request: ColumnRequest,
) -> ScoredModel:
    layout = long_layout(columns, sample, request.label_column, request.group_column, name)
    if layout is not None:
        logger.info(f"{name}: {layout.text}")
        found = _Found()
        groups = group_rows(rows, layout, request.subset_column)
        for row, group in groups[: request.max_groups]:
            _add(found, row, group)
        how = layout.text
    else:
        readable = [row.value for row in rows if isinstance(row.value, Mapping)]
        has_chosen = all(key in sample[0] for key in ("chosen", "rejected"))
        labels = label_reader(columns, request.label_column, readable, has_chosen, ignored, name)
        how = f"{columns.text}: {labels.text}"
        found = _read_wide(columns, labels, rows[: request.max_groups], ignored, request.subset_column)
    use = _data_use(found, how)
    _judge(found, name, how, request.max_rejected_share)
    compare_with_published([row.value for row in found.rows], found.groups, name, how)
    return ScoredModel(columns.text, name, found.groups, data=use)


def _add(found: _Found, row: ResultRow, group: ScoredGroup | UnusableScores) -> None:
    if isinstance(group, UnusableScores):
        found.refused.append((row, group))
    else:
        found.groups.append(group)
        found.rows.append(row)


# --- One row, one group ----------------------------------------------------------------------------------------------


def _read_wide(
    columns: ScoreColumns, labels: LabelReader, rows: Sequence[ResultRow], ignored: Sequence[str], subset_column: str
) -> _Found:
    found = _Found()
    readers: dict[str, Any] = {}
    seen = Counter(_id_of(row, subset_column) for row in rows)
    for row in rows:
        if row.source not in readers:
            sample = [one.value for one in rows if one.source == row.source and isinstance(one.value, Mapping)]
            readers[row.source] = preference_reader(sample[:_SAMPLE], row.source, ignored)
        try:
            scores, label = read_row(row.value, columns, labels)
            # An id that stands for several rows would let other rows be compared with each other.
            identity = _id_of(row, subset_column)
            keys = row_keys(row.value, row.number, readers[row.source])
            group = ScoredGroup(
                rewards=scores,
                ranks=label.ranks,
                soft_label=label.soft_label,
                subset=identity[1],
                id=identity[0] if seen[identity] == 1 else str(row.number),
                source=row.source,
                prompt="" if keys[0] is None else hash_text(keys[0]),
                content="" if keys[1] is None else hash_text(keys[1]),
            )
        except UnusableScores as problem:
            _add(found, row, problem)
        else:
            _add(found, row, group)
    return found


def read_row(value: Any, columns: ScoreColumns, labels: LabelReader) -> tuple[list[float], Label]:
    """Return the scores of one row, and its label.

    Raises:
        UnusableScores: why the row can't be used, and how many comparisons are lost with it.
    """
    if isinstance(value, RejectedRow):
        raise UnusableScores(value.reason, value.detail)
    if not isinstance(value, Mapping):
        raise UnusableScores("wrong_type", f"the row is {value!r:.60}, not an object with columns")
    parts = columns.parts(value)
    label = labels.read(value, [len(part) for part in parts])
    numbers = [number for part in parts for number in part]
    problem = first_problem(numbers)
    if problem is not None:
        lost = len(group_pairs(label.ranks, None, label.soft_label, keep_ties=False))
        raise UnusableScores(problem.reason, problem.detail, lost)
    return [number for number in numbers if isinstance(number, float)], label


def _id_of(row: ResultRow, subset_column: str) -> tuple[str, str]:
    """Return the row's own name, or its number, and its subset."""
    value = row.value if isinstance(row.value, Mapping) else {}
    own = next((value[name] for name in ("id", "question_id", "pair_id") if value.get(name) not in (None, "")), None)
    subset = value.get(subset_column)
    known = isinstance(own, str | int | float)
    return str(own) if known else str(row.number), str(subset) if isinstance(subset, str | int | float) else ""


# --- What became of the rows -----------------------------------------------------------------------------------------


def _data_use(found: _Found, how: str) -> DataUse:
    refused: dict[tuple[str, str], list[int]] = {}
    for row, problem in found.refused:
        refused.setdefault((row.source, problem.reason), []).append(row.number)
    tied = [
        row.number
        for row, group in zip(found.rows, found.groups, strict=True)
        if any(group.rewards[pair.better] == group.rewards[pair.worse] for pair in _pairs(group))
    ]
    lost = sum(problem.num_pairs for _, problem in found.refused)
    right = sum(
        group.rewards[pair.better] > group.rewards[pair.worse] for group in found.groups for pair in _pairs(group)
    )
    total = lost + sum(len(_pairs(group)) for group in found.groups)
    sizes = Counter(len(group.rewards) for group in found.groups)
    every = [*found.rows, *(row for row, _ in found.refused)]
    return DataUse(
        sources=list(dict.fromkeys(row.source for row in every)),
        rows_read=len(every),
        rows_used=len(found.rows),
        rejected=[
            {
                "source": source,
                "reason": reason,
                "meaning": _MEANINGS[reason],
                "count": len(numbers),
                "first_rows": numbers[:NUM_FIRST_ROWS],
            }
            for (source, reason), numbers in refused.items()
        ],
        read_as=how,
        group_sizes={str(size): count for size, count in sorted(sizes.items())},
        tied_rows={"count": len(tied), "first_rows": tied[:NUM_FIRST_ROWS]},
        num_pairs_lost=lost,
        accuracy_if_lost=right / total if total else None,
    )


def _pairs(group: ScoredGroup) -> list[Any]:
    return group_pairs(group.ranks, group.margin, group.soft_label, keep_ties=False)


def _judge(found: _Found, name: str, how: str, max_rejected_share: float) -> None:
    """Say what can't be used, and stop when it is too much, or everything."""
    reasons: dict[str, list[tuple[ResultRow, UnusableScores]]] = {}
    for row, problem in found.refused:
        reasons.setdefault(problem.reason, []).append((row, problem))
    lines = [
        f"{reason}: {len(rows):,} ({_MEANINGS[reason]}); rows {_numbers_text(rows)}; the first: {rows[0][1].detail}"
        for reason, rows in sorted(reasons.items(), key=lambda entry: -len(entry[1]))
    ]
    total = len(found.rows) + len(found.refused)
    said = f"{name}, {how}: {len(found.refused):,} of {total:,} can't be used. {'. '.join(lines)}"
    if len(found.refused) > max_rejected_share * total or not found.rows:
        share = math.ceil(1000 * len(found.refused) / total) / 1000
        other = f", or leave them out with --max_rejected_share {share:g}" if found.rows else ""
        raise DataError(f"{said}. Fix: correct these rows{other}.")
    if lines:
        logger.warning(f"{said}. They are left out, and counted.")


def _numbers_text(rows: Sequence[tuple[ResultRow, UnusableScores]]) -> str:
    shown = ", ".join(str(row.number) for row, _ in rows[:NUM_FIRST_ROWS])
    return f"{shown}, ..." if len(rows) > NUM_FIRST_ROWS else shown

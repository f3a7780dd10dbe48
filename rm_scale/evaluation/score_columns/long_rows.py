"""Long files: one score per row, and the rows of one prompt make a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.text_keys import text_hash
from rm_scale.errors import DataError
from rm_scale.evaluation.score_columns.group_texts import PROMPT_COLUMNS
from rm_scale.evaluation.score_columns.result_rows import ResultRow
from rm_scale.evaluation.score_columns.score_labels import is_rank_column, label_number, ranks_of_labels
from rm_scale.evaluation.score_columns.score_values import ScoreColumns, UnusableScores, find, first_problem
from rm_scale.evaluation.scores_file import hash_text
from rm_scale.json_values import as_number
from rm_scale.texts import one_line, some_names
from rm_scale.training.pair_counts import ScoredGroup

_GROUP_COLUMNS = ("group_id", "group", "prompt_id", "question_id", "pair_id", *PROMPT_COLUMNS)
_LABEL_COLUMNS = ("rank", "label", "correct", "is_correct", "preferred", "is_chosen", "better")


@dataclass(frozen=True)
class LongLayout:
    """How the rows of a long file are read.

    Attributes:
        columns: the one column with a score per row.
        label: the column of the labels; the highest is best, or of a `rank` the smallest.
        group: what the rows of one group have in common.
    """

    columns: ScoreColumns
    label: str
    group: str

    @property
    def text(self) -> str:
        """How it is read, for people."""
        order = "smallest" if is_rank_column(self.label) else "highest"
        return f"{self.columns.text}: one score per row, groups by {self.group}, the {order} {self.label} is best"


def long_layout(
    columns: ScoreColumns,
    sample: Sequence[Mapping[str, Any]],
    label: str | None,
    group: str | None,
    name: str,
) -> LongLayout | None:
    """Return how a file with one score per row is read; `None` where rows hold all scores of a group.

    Args:
        columns: the scores.
        sample: the first readable rows.
        label, group: columns that the user names; `None` looks for known ones.
        name: of the file, for messages.

    Raises:
        DataError: it has one score per row, and no column that says which rows belong together, or which is better.
    """
    if len(columns.columns) > 1 or not _is_single(columns, sample):
        if group is not None:
            raise DataError(
                f"--group_column {group}: {name} holds all scores of a group in one row ({columns.text}). Fix: leave "
                "it out."
            )
        return None
    found = {"label": _named(label, _LABEL_COLUMNS, sample), "group": _named(group, _GROUP_COLUMNS, sample)}
    absent = [option for option, column in found.items() if column is None]
    if absent:
        known = some_names(list(dict.fromkeys(str(key) for row in sample for key in row)))
        raise DataError(
            f"{name}: {columns.text} holds one score per row, and no column that is known says "
            f"{' and '.join(_SAYS[option] for option in absent)} (it has {known}). Fix: "
            f"{' and '.join(f'--{option}_column NAME' for option in absent)}; for chosen and rejected scores in two "
            "columns: --score_column CHOSEN,REJECTED."
        )
    return LongLayout(columns, str(found["label"]), str(found["group"]))


_SAYS = {"label": "which response is the better one", "group": "which rows belong together"}


def _named(asked: str | None, known: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> str | None:
    names = (asked,) if asked is not None else known
    return next((name for name in names if any(find(row, name) is not None for row in sample)), None)


def _is_single(columns: ScoreColumns, sample: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the first row that has scores has one."""
    for row in sample:
        try:
            return len(columns.parts(row)[0]) == 1
        except UnusableScores:
            continue
    return False


def group_rows(
    rows: Sequence[ResultRow], layout: LongLayout, subset_column: str
) -> list[tuple[ResultRow, ScoredGroup | UnusableScores]]:
    """Return the groups in the order of their first rows, or why one can't be used; that row stands for the group.

    A group of which one score can't be used is left out whole: without that response it would be an easier one.
    """
    members: dict[tuple[str, Any], list[ResultRow]] = {}
    unreadable: list[tuple[ResultRow, ScoredGroup | UnusableScores]] = []
    for row in rows:
        problem = _row_problem(row, layout)
        if problem is not None:
            unreadable.append((row, problem))
            continue
        key = find(row.value, layout.group)
        members.setdefault((row.source, text_hash(key)), []).append(row)
    groups = [(found[0], _group(found, layout, subset_column)) for found in members.values()]
    return [*groups, *unreadable]


def _row_problem(row: ResultRow, layout: LongLayout) -> UnusableScores | None:
    if isinstance(row.value, RejectedRow):
        return UnusableScores(row.value.reason, row.value.detail)
    if not isinstance(row.value, Mapping):
        return UnusableScores("wrong_type", f"the row is {row.value!r:.60}, not an object with columns")
    if find(row.value, layout.group) is None:
        return UnusableScores("missing_key", f"{layout.group} is absent or null")
    return None


def _group(rows: Sequence[ResultRow], layout: LongLayout, subset_column: str) -> ScoredGroup | UnusableScores:
    if len(rows) < 2:
        return UnusableScores("single_response", f"{layout.group} of row {rows[0].number} is in no other row", 0)
    try:
        ranks = ranks_of_labels([_label(row, layout.label) for row in rows], is_rank_column(layout.label))
        scores = [_score(row, layout.columns) for row in rows]
    except UnusableScores as problem:
        return problem
    first = rows[0].value
    subset = first.get(subset_column)
    key = find(first, layout.group)
    return ScoredGroup(
        rewards=scores,
        ranks=ranks,
        subset=str(subset) if isinstance(subset, str | int | float) else "",
        id=str(key) if isinstance(key, int) or (isinstance(key, str) and len(key) <= 80) else str(rows[0].number),
        source=rows[0].source,
        prompt=hash_text(text_hash([key, None])),
    )


def _label(row: ResultRow, column: str) -> float:
    value = find(row.value, column)
    number = float(value) if isinstance(value, bool) else as_number(value)
    if number is None and isinstance(value, str):
        word = value.strip().lower()
        whole = label_number(value)
        known = {"chosen": 1.0, "rejected": 0.0, "true": 1.0, "false": 0.0, "correct": 1.0, "incorrect": 0.0}
        number = known.get(word) if whole is None else float(whole)
    if number is None:
        raise UnusableScores("bad_label", f"row {row.number}: {column}={one_line(repr(value), 60)}")
    return number


def _score(row: ResultRow, columns: ScoreColumns) -> float:
    (part,) = columns.parts(row.value)
    if len(part) != 1:
        raise UnusableScores("ragged_scores", f"row {row.number}: {columns.text} holds {len(part)} scores, not one")
    problem = first_problem(part)
    if problem is not None:
        raise UnusableScores(problem.reason, f"row {row.number}: {problem.detail}")
    assert isinstance(part[0], float)
    return part[0]

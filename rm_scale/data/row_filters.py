"""Leave out rows that a source's filters don't let through, by the values of the source's own columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rm_scale.config_sources import ColumnFilter
from rm_scale.data.column_maps.paths import value_at
from rm_scale.data.rejected_rows import FILTERED, RejectedRow
from rm_scale.data.row_values import Row
from rm_scale.errors import DataError
from rm_scale.texts import did_you_mean, one_line


def leave_out_filtered(row: Row, filters: Iterable[ColumnFilter]) -> None:
    """Let a row pass that has what its filters ask for; a column that it lacks counts as null.

    Raises:
        RejectedRow: `FILTERED`, it does not.
    """
    for rule in filters:
        value = _value(row, rule.column)
        if not rule.passes(value):
            raise RejectedRow(FILTERED, f"{rule.column} is {one_line(repr(value), 80)}")


def rows_that_pass(rows: Sequence[Row], filters: Sequence[ColumnFilter], name: str) -> list[Row]:
    """Return those of a source's first rows that its filters let through; all of them where none passes.

    Raises:
        DataError: none of the rows has a filter's column; the text names those that there are.
    """
    for rule in filters:
        if not any(_has(row, rule.column) for row in rows):
            columns = list(dict.fromkeys(column for row in rows for column in row))
            raise DataError(
                f"{name}: filters: {rule.column}: none of the first {len(rows)} rows has such a column. Fix: "
                + did_you_mean(rule.column, columns, f"one of {', '.join(columns[:20])}.")
            )
    return [row for row in rows if passes_all(row, filters)] or list(rows)


def passes_all(row: Row, filters: Sequence[ColumnFilter]) -> bool:
    """Tell whether filters let a row through."""
    return all(rule.passes(_value(row, rule.column)) for rule in filters)


def _value(row: Row, column: str) -> object:
    try:
        return value_at(row, column)
    except RejectedRow:
        return None


def _has(row: Row, column: str) -> bool:
    try:
        value_at(row, column)
    except RejectedRow:
        return False
    return True

"""Scores that were made elsewhere, read from columns of a file: which columns, what is the right answer, which rows."""

from __future__ import annotations

from rm_scale.evaluation.score_columns.column_scores import ColumnRequest, read_column_scores

__all__ = ["ColumnRequest", "read_column_scores"]

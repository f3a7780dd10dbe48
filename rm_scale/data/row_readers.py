"""Open a source and choose what reads its rows: format, and column map or preset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rm_scale.data.column_maps.column_map import ColumnMap
from rm_scale.data.format_detection import FormatVerdict, choose_format
from rm_scale.data.formats import RowReader
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row
from rm_scale.data.sources import RawRows, Source
from rm_scale.errors import DataError


def open_source(source: Source, work: Path) -> RawRows:
    """Return the rows of a source as they are read: those of a file, or groups of them where its map says so.

    Args:
        source: what to read.
        work: folder for temporary files.

    Raises:
        DataError: it can't be read.
    """
    return source.load(work)


def choose_reader(source: Source, raw: RawRows, sample: Sequence[Row]) -> tuple[RowReader, FormatVerdict]:
    """Return what reads the rows of a source, and why so.

    Args:
        source: what is read.
        raw: its rows, from `open_source`.
        sample: the first readable ones of them.

    Raises:
        DataError: its map or preset does not fit, or no format does.
    """
    reading = source.reading
    columns = raw.columns(sample)
    column_map = reading.column_map(columns)
    if column_map is not None:
        sample = _mapped(column_map, sample, source.name)
        columns = list(dict.fromkeys(name for row in sample for name in row))
    verdict = choose_format(reading.format, columns, sample, source.name, reading.subset_column, reading.ignore_columns)
    reader = RowReader(verdict.name, reading.subset_column, source.name, reading.ignore_columns, column_map=column_map)
    return reader, verdict


def _mapped(column_map: ColumnMap, sample: Sequence[Row], name: str) -> list[dict[str, Any]]:
    """Return the first rows in the columns of a format, without those that the map does not fit.

    Raises:
        DataError: it fits none of them.
    """
    rows, refusal = [], None
    for row in sample:
        try:
            rows.append(column_map.apply(row))
        except RejectedRow as rejected:
            refusal = refusal or rejected
    if not rows:
        raise DataError(
            f"{name}: the column map fits none of the first rows ({refusal}). Fix: correct dataset_columns."
        )
    return rows

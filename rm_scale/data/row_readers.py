"""Open a source and choose what reads its rows: format, and column map or preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rm_scale.data.column_maps.column_map import ColumnMap, missing_paths
from rm_scale.data.column_maps.misfits import misfit_text
from rm_scale.data.column_maps.presets import preset_named
from rm_scale.data.column_maps.regrouping import Regrouping
from rm_scale.data.format_detection import FormatVerdict, choose_format, refuse_unread_context
from rm_scale.data.formats import RowReader
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_filters import rows_that_pass
from rm_scale.data.row_values import Row
from rm_scale.data.sources import RawRows, Source, load_raw
from rm_scale.errors import DataError
from rm_scale.files import write_whole


def open_source(source: Source, work: Path) -> RawRows:
    """Return the rows of a source as they are read: those of a file, or groups of them where its map says so.

    Args:
        source: what to read.
        work: folder for temporary files.

    Raises:
        DataError: it can't be read, or its map, which puts rows together, does not fit its columns.
    """
    raw = source.load(work)
    try:
        sample = raw.sample()
    except DataError:
        return raw  # whoever takes a sample of it next says so, with the source's name
    columns = raw.columns(sample)
    column_map = source.reading.column_map(columns)
    if column_map is None or not column_map.regroups:
        return raw
    if source.reading.filters:
        raise DataError(
            f"{source.name}: filters with a map that puts rows together: they look at columns of single rows. Fix: "
            "filter the file beforehand."
        )
    missing = sorted(name for name in column_map.columns_needed if not any(name in row for row in sample))
    if missing:
        raise DataError(misfit_text(source.name, source.reading, missing, sample))
    preset = source.reading.recognised(columns)
    return dataclasses.replace(_regrouped(raw, column_map, source.name, work), preset=preset)


def _regrouped(raw: RawRows, column_map: ColumnMap, name: str, work: Path) -> RawRows:
    def read(places: Sequence[int]) -> list[tuple[int, Any]]:
        return raw.decode(raw.dataset[list(places)], places)

    folder = work / "regrouped"
    folder.mkdir(exist_ok=True)
    told = folder / "told.txt"
    regrouping = Regrouping(column_map, read, len(raw.dataset))
    found = load_raw(regrouping.rows(), name, folder)
    if regrouping.told:  # otherwise an earlier call has written the rows
        write_whole(told, regrouping.told)
    return dataclasses.replace(found, told=told.read_text(encoding="utf-8"))


def is_read_by_rows(source: Source, columns: Collection[str]) -> bool:
    """Tell whether each row of a source is read by itself, so that its file can be cut anywhere between two lines."""
    column_map = source.reading.column_map(columns)
    return column_map is None or not column_map.regroups


class HasColumns(Protocol):
    """Rows of which the columns are known."""

    @property
    def told(self) -> str:
        """What became of the file's rows before they are read, in words; "" where they are read as they are."""
        ...

    @property
    def preset(self) -> str | None:
        """The preset by which they were put together, if the columns told it."""
        ...

    def columns(self, sample: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return their names, where need be from the first rows."""
        ...


def choose_reader(source: Source, raw: HasColumns, sample: Sequence[Row]) -> tuple[RowReader, FormatVerdict]:
    """Return what reads the rows of a source, and why so.

    Args:
        source: what is read.
        raw: its rows, from `open_source`.
        sample: the first readable ones of them.

    Raises:
        DataError: its map or preset does not fit, no format does, or a filter names no column.
    """
    filters = source.reading.filters
    reader, verdict = _choose_reader(source, raw, rows_that_pass(sample, filters, source.name) if filters else sample)
    return dataclasses.replace(reader, filters=filters), verdict


def _choose_reader(source: Source, raw: HasColumns, sample: Sequence[Row]) -> tuple[RowReader, FormatVerdict]:
    reading = source.reading
    columns = raw.columns(sample)
    recognised = raw.preset or reading.recognised(columns)
    column_map = preset_named(recognised).columns if recognised else reading.column_map(columns)
    if column_map is None:
        verdict = choose_format(
            reading.format, columns, sample, source.name, reading.subset_column, reading.ignore_columns
        )
        return RowReader(verdict.name, reading.subset_column, source.name, reading.ignore_columns), verdict
    missing = missing_paths(column_map, sample)
    if missing:
        raise DataError(misfit_text(source.name, reading, missing, sample))
    mapped = _mapped(column_map, sample, source.name, reading.setting)
    asked = column_map.format if reading.format == "auto" else reading.format
    if column_map.format == "ranked" and not any("responses" in row for row in mapped):
        asked = "auto"
    found = list(dict.fromkeys(name for row in mapped for name in row))
    verdict = choose_format(asked, found, mapped, source.name, reading.subset_column, checks_context=False)
    reader = RowReader(verdict.name, reading.subset_column, source.name, reading.ignore_columns, column_map=column_map)
    refuse_unread_context(reader, sample, reading.format)
    own_columns = dict.fromkeys(name for row in sample for name in column_map.columns_of(row))
    unread = [name for name in own_columns if name not in {*column_map.columns_read, reading.subset_column, "id"}]
    how = f"its columns are those of the preset {recognised}" if recognised else f"{reading.setting} says so"
    why = f"{how}; {raw.told}" if raw.told else how
    return reader, FormatVerdict(verdict.name, why, tuple(dict.fromkeys([*unread, *reading.ignore_columns])))


def _mapped(column_map: ColumnMap, sample: Sequence[Row], name: str, setting: str) -> list[dict[str, Any]]:
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
        raise DataError(f"{name}: {setting} fits none of the first {len(sample)} rows ({refusal}). Fix: correct it.")
    return rows

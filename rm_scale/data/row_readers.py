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
from rm_scale.data.reading import Reading
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
    missing = column_map.missing_before(sample)
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


def choose_reader(
    source: Source, raw: HasColumns, sample: Sequence[Row], checks_context: bool = True
) -> tuple[RowReader, FormatVerdict]:
    """Return what reads the rows of a source, and why so.

    Args:
        source: what is read.
        raw: its rows, from `open_source`.
        sample: the first readable ones of them.
        checks_context: refuse a source, and rows, with context in a column that is not read.

    Raises:
        DataError: its map or preset does not fit, no format does, or a filter names no column.
    """
    reading, name = source.reading, source.name
    if reading.filters:
        sample = rows_that_pass(sample, reading.filters, name)
    columns = raw.columns(sample)
    recognised = raw.preset or reading.recognised(columns)
    column_map = preset_named(recognised).columns if recognised else reading.column_map(columns)
    if column_map is not None:
        how = f"its columns are those of the preset {recognised}" if recognised else f"{reading.setting} says so"
        why = f"{how}; {raw.told}" if raw.told else how
        reader, verdict = _through_map(column_map, reading, name, sample, checks_context)
        return dataclasses.replace(reader, filters=reading.filters), dataclasses.replace(verdict, why=why)
    subset, ignored = reading.subset_column, reading.ignore_columns
    verdict = choose_format(reading.format, columns, sample, name, subset, ignored, checks_context)
    return RowReader(verdict.name, subset, name, ignored, checks_context, filters=reading.filters), verdict


def reader_of_rows(rows: Sequence[Row], name: str, ignored: Sequence[str]) -> RowReader | None:
    """Return what reads these rows as training reads a file of them without further settings.

    Args:
        rows: the first readable ones.
        name: of the file.
        ignored: columns that are not read.

    Returns:
        `None` where they are no preferences in a known form, or where training would put several together.
    """
    columns = list(dict.fromkeys(str(column) for row in rows for column in row))
    reading = Reading(ignore_columns=tuple(ignored))
    column_map = reading.column_map(columns)
    try:
        if column_map is not None:
            return None if column_map.regroups else _through_map(column_map, reading, name, rows, False)[0]
        verdict = choose_format("auto", columns, rows, name, reading.subset_column, ignored, checks_context=False)
    except DataError:
        return None
    return RowReader(verdict.name, source=name, ignore_columns=tuple(ignored), checks_context=False)


def _through_map(
    column_map: ColumnMap, reading: Reading, name: str, sample: Sequence[Row], checks_context: bool
) -> tuple[RowReader, FormatVerdict]:
    missing = missing_paths(column_map, sample)
    if missing:
        raise DataError(misfit_text(name, reading, missing, sample))
    mapped = _mapped(column_map, sample, name, reading.setting)
    asked = column_map.format if reading.format == "auto" else reading.format
    if column_map.format == "ranked" and not any("responses" in row for row in mapped):
        asked = "auto"  # every sampled row is a tie of two
    found = list(dict.fromkeys(column for row in mapped for column in row))
    verdict = choose_format(asked, found, mapped, name, reading.subset_column, checks_context=False)
    subset, ignored = reading.subset_column, reading.ignore_columns
    reader = RowReader(verdict.name, subset, name, ignored, checks_context, column_map)
    if checks_context:
        refuse_unread_context(reader, sample, reading.format)
    own_columns = dict.fromkeys(column for row in sample for column in column_map.columns_of(row))
    unread = [column for column in own_columns if column not in {*column_map.columns_read, subset, "id"}]
    return reader, dataclasses.replace(verdict, ignored_columns=tuple(dict.fromkeys([*unread, *ignored])))


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

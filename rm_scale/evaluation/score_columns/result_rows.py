"""Read the rows of files with results as they are published: lists of rows, JSON Lines, and tables of columns.

RewardBench writes one JSON object with a list per column, pandas one with an object per column; both become rows.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rm_scale.data.sources import Source, local_sources
from rm_scale.data.text_files import most_unpacked_bytes
from rm_scale.errors import DataError
from rm_scale.json_values import parse_json

# Columns that are lists where the file is a table, and single values where it is a row.
_ONE_PER_ROW = ("id", "ids", "subset", "subsets", "question_id", "pair_id")


class ResultRow(NamedTuple):
    """One row of a file.

    Attributes:
        source: name of the file.
        number: its index there, from 0.
        value: an object with columns, or the `RejectedRow` that says why it can't be read.
    """

    source: str
    number: int
    value: Any


def read_result_rows(paths: Sequence[str], split: str = "test") -> list[ResultRow]:
    """Read all rows of files, which are held in memory.

    Args:
        paths: JSON, JSONL, CSV (plain or gzipped), Parquet or Arrow files; patterns are allowed.
        split: which one is read of a folder that holds several.

    Raises:
        DataError: a file can't be read, has no rows, or is a table whose columns differ in length.
    """
    return [row for source in local_sources(paths, split) for row in _rows_of(source)]


def _rows_of(source: Source) -> list[ResultRow]:
    table = _json_object(source.name)
    if table is not None:
        rows = _rows_of_object(table, source.name)
        if rows is not None:
            return [ResultRow(source.name, number, row) for number, row in enumerate(rows)]
    with tempfile.TemporaryDirectory(prefix="rm_scale_results_") as work:
        raw = source.load(Path(work))
        count = len(raw.dataset)
        found = raw.decode(raw.dataset[:count], range(count))
    if len(found) == 1 and isinstance(found[0][1], Mapping) and _names_rows(found[0][1]):
        return [ResultRow(source.name, number, row) for number, row in enumerate(_transposed(found[0][1], source.name))]
    return [ResultRow(source.name, number, value) for number, value in found]


# --- Tables of columns -----------------------------------------------------------------------------------------------


def _json_object(name: str) -> dict[str, Any] | None:
    """Return the one object that a JSON file holds; `None` for a list, for JSON Lines, and for other files."""
    path = Path(name)
    if not name.lower().endswith((".json", ".json.gz")) or not path.is_file():
        return None
    packed = name.lower().endswith(".gz")
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            if not stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                return None
            stream.seek(0)
            content = stream.read(most_unpacked_bytes(path.stat().st_size) + 1)
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error}). Fix: check that the file is complete.") from error
    if len(content) > most_unpacked_bytes(path.stat().st_size):
        raise DataError(f"{name}: unpacks to more than is read at once. Fix: store its rows as JSONL.")
    try:
        value = parse_json(content.decode("utf-8-sig"))
    except ValueError:  # one object per line, or broken: the reader of rows says which line
        return None
    return value if isinstance(value, dict) else None


def _rows_of_object(table: Mapping[str, Any], name: str) -> list[dict[str, Any]] | None:
    """Return the rows of a file that is one object; `None` where the object is itself a row."""
    columns = {key: value for key, value in table.items() if isinstance(value, list | dict)}
    objects = {key: list(value.items()) for key, value in columns.items() if isinstance(value, dict)}
    if columns and len(objects) == len(columns):
        indexes = [[place for place, _ in entries] for entries in objects.values()]
        if indexes[0][:1] == ["0"] and all(index == indexes[0] for index in indexes):
            values = {key: [value for _, value in entries] for key, entries in objects.items()}
            return _transposed({**table, **values}, name)
        return None
    lists = {key: value for key, value in columns.items() if isinstance(value, list)}
    if len(lists) == 1:
        (rows,) = lists.values()
        if rows and all(isinstance(row, dict) and "role" not in row for row in rows):
            return rows  # {"model": ..., "data": [row, row]}
    if lists and (_names_rows(table) or len(lists) == len(table)):
        return _transposed(table, name)
    return None


def _names_rows(row: Mapping[str, Any]) -> bool:
    """Tell whether what has one value per row has several here."""
    return any(isinstance(row.get(name), list) for name in _ONE_PER_ROW)


def _transposed(table: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a table's rows; what it says once, of the model for instance, stands in each."""
    lengths = {key: len(value) for key, value in table.items() if isinstance(value, list)}
    if len(set(lengths.values())) != 1:
        seen = ", ".join(f"{key} {length:,}" for key, length in lengths.items())
        raise DataError(
            f"{name}: is a table whose columns differ in length ({seen}). Fix: write the file again; each column has "
            "one value per row."
        )
    count = next(iter(lengths.values()))
    if not count:
        raise DataError(f"{name}: has no rows. Fix: give a file with at least one row.")
    return [
        {key: value[number] if key in lengths else value for key, value in table.items()} for number in range(count)
    ]

"""Read a source's rows one after the other, from any row on, without a copy of them on disk."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rm_scale.data.text_files import RawRow, csv_rows, json_rows, jsonl_rows, parse_row
from rm_scale.errors import DataError
from rm_scale.texts import first_line

_TEXT_FILES: Mapping[str, Callable[[Path], Iterator[RawRow]]] = {
    ".json": json_rows,
    ".jsonl": jsonl_rows,
    ".csv": csv_rows,
}
_BATCH_ROWS = 256


def file_rows(path: Path, suffix: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each row of a file from row `start` on; a row that can't be read is a `RejectedRow`.

    Args:
        path: the file.
        suffix: what kind of file it is, without `.gz`.
        start: number of the first row wanted, from 0.

    Raises:
        DataError: the file ends early or is damaged; the text says at which row.
    """
    read = _text_rows if suffix in _TEXT_FILES else _parquet_rows if suffix == ".parquet" else _arrow_rows
    last = start - 1
    try:
        for row, value in read(path, suffix, start):
            last = row
            yield row, value
    except (OSError, EOFError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: ends early or is damaged, at row {last + 1:,}: {first_line(error)}. Fix: check that the file is "
            "complete."
        ) from error


def _text_rows(path: Path, suffix: str, start: int) -> Iterator[tuple[int, Any]]:
    for row, raw, problem in _TEXT_FILES[suffix](path):
        if row >= start:
            yield row, parse_row(raw, problem)


def _parquet_rows(path: Path, suffix: str, start: int) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    row = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row + count > start:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group]):
                yield from ((row + n, value) for n, value in enumerate(batch.to_pylist()) if row + n >= start)
                row += len(batch)
        else:
            row += count


def _arrow_rows(path: Path, suffix: str, start: int) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            batches: Iterator[Any] = iter(pa.ipc.open_stream(source))
        except pa.ArrowInvalid:  # Arrow's "file" layout, with a footer
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        row = 0
        for batch in batches:
            if row + len(batch) > start:
                yield from ((row + n, value) for n, value in enumerate(batch.to_pylist()) if row + n >= start)
            row += len(batch)


def hub_rows(dataset: Any, name: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each row of a data set that `datasets` streams, from row `start` on.

    Args:
        dataset: an `IterableDataset`.
        name: its name in messages.
        start: number of the first row wanted, from 0.

    Raises:
        DataError: it can't be read further; the text says at which row.
    """
    import httpx
    from datasets.exceptions import DatasetsError

    last = start - 1
    try:
        for row, value in zip(itertools.count(start), dataset.skip(start), strict=False):
            last = row
            yield row, value
    except (OSError, EOFError, ValueError, DatasetsError, httpx.HTTPError) as error:
        raise DataError(
            f"{name}: the stream ends early, at row {last + 1:,}: {first_line(error)}. Fix: check the network, and "
            "start the run again: it goes on where it was."
        ) from error

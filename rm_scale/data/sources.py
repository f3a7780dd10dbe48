"""Find the local files of a run and load them as raw rows that can be read in parallel.

JSON and CSV are read row by row with Python's own parsers into an Arrow file of raw rows (`rm_scale.data.text_files`):
libraries that infer a column's type from the first rows crash on, or silently convert, whatever differs later. Parquet,
Arrow and hub data carry their types with them and go through `datasets`. No data set is held in memory whole.
"""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rm_scale.data.reading import Reading
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.stream_rows import file_rows
from rm_scale.data.text_files import (
    MAX_COLUMNS,
    RawRow,
    csv_rows,
    json_rows,
    jsonl_rows,
    most_unpacked_bytes,
    parse_row,
)
from rm_scale.errors import DataError
from rm_scale.files import files_of_pattern, not_a_file, replacing
from rm_scale.texts import first_line, nearest_file

SUPPORTED_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".arrow")
SAMPLE_ROWS = 200
_WRITE_ROWS = 1000


@dataclass(frozen=True)
class RawRows:
    """The rows of one source as a memory-mapped `datasets.Dataset`.

    Attributes:
        dataset: columns `row`, `raw` (JSON bytes) and `problem` if `is_json`; otherwise the source's own columns.
        is_json: whether rows still have to be parsed.
        told: what became of the file's rows, in words, where they were put together.
        preset: the preset by which they were, if the columns told it.
    """

    dataset: Any
    is_json: bool
    told: str = ""
    preset: str | None = None

    def decode(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> list[tuple[int, Any]]:
        """Return index and value of each row of a batch of `dataset`; a row that can't be read is a `RejectedRow`."""
        if self.is_json:
            return [
                (row, parse_row(raw, problem))
                for row, raw, problem in zip(batch["row"], batch["raw"], batch["problem"], strict=True)
            ]
        names = list(batch)
        columns = zip(*(batch[name] for name in names), strict=True)
        return [(index, dict(zip(names, values, strict=True))) for index, values in zip(indices, columns, strict=True)]

    def rows_from(self, start: int) -> Iterator[tuple[int, Any]]:
        """Yield index and value of each row from `start` on."""
        for first in range(start, len(self.dataset), _WRITE_ROWS):
            batch = self.dataset[first : first + _WRITE_ROWS]
            yield from self.decode(batch, range(first, min(first + _WRITE_ROWS, len(self.dataset))))

    def sample(self, num_rows: int = SAMPLE_ROWS) -> list[dict[str, Any]]:
        """Return those of the first rows that are readable objects.

        Raises:
            DataError: none of them is; the text says what is wrong with the first one.
        """
        count = min(num_rows, len(self.dataset))
        return readable_rows([row for _, row in self.decode(self.dataset[:count], range(count))])

    def columns(self, sample: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the column names in order: those declared, or for JSON those seen in the sample."""
        if not self.is_json:
            return list(self.dataset.column_names)
        return columns_of(sample)


def readable_rows(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return those of a source's first rows that are objects.

    Args:
        rows: one or more, as `RawRows.decode` returns them.

    Raises:
        DataError: none of them is; the text says what is wrong with the first one.
    """
    readable = [row for row in rows if isinstance(row, dict)]
    if not readable:
        seen = str(rows[0]) if isinstance(rows[0], RejectedRow) else f"a value that is no object: {rows[0]!r:.80}"
        raise DataError(
            f"none of the first {len(rows)} rows is a readable object; the first is {seen}. "
            "Fix: check the file's kind; each row must be an object with columns, e.g. prompt, chosen, rejected."
        )
    return readable


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that rows have, in the order in which they occur."""
    return list(dict.fromkeys(name for row in rows for name in row))


@dataclass(frozen=True)
class Source:
    """One file, folder or hub split to read.

    Attributes:
        name: its name in reports: the path as given, or hub name and split.
        identity: what must be unchanged for cached results to be valid, as JSON values.
        load: reads it; takes a folder for files that are written on the way. What is complete in that folder, from an
            earlier call by whatever process, is used again.
        reading: how its rows are read.
        lines: the file, if it is JSONL that isn't compressed: its rows can be read from any line on.
        look_again: returns `identity` as it is now; `None` for what can't change.
        member: name of the entry of `datasets` or `eval_datasets` that it belongs to; "" without such a list.
        commit: of a hub data set, that it was read at.
        stream: yields number and value of each row from a given row on, without a copy of the rows on disk.
    """

    name: str
    identity: dict[str, Any]
    load: Callable[[Path], RawRows] = field(repr=False, compare=False)
    reading: Reading = field(default_factory=Reading)
    lines: Path | None = field(default=None, compare=False)
    look_again: Callable[[], dict[str, Any]] | None = field(default=None, repr=False, compare=False)
    member: str = ""
    commit: str | None = None
    stream: Callable[[int], Iterator[tuple[int, Any]]] | None = field(default=None, repr=False, compare=False)


# --- Finding sources -----------------------------------------------------------------------------------------------


def local_sources(paths: Sequence[str], split: str = "train", where: str = "dataset_path") -> list[Source]:
    """Return the sources for files, patterns such as `data/*.jsonl`, and folders written by `datasets`' `save_to_disk`.

    Args:
        paths: files, patterns or folders.
        split: which split to take from a folder that holds several.
        where: the setting that names them, for messages.

    Raises:
        DataError: a file is missing, or its suffix is not supported.
    """
    return [_local_source(name, split, where) for path in paths for name in _expand(path, where)]


def _expand(path: str, where: str) -> list[str]:
    if Path(path).exists() or not glob.has_magic(path):
        return [path]
    try:
        found = files_of_pattern(path)
    except ValueError as error:
        raise DataError(f"{where}={path}: {error}") from error
    if not found:
        raise DataError(f"{where}={path}: the pattern matches no file. Fix: check it with ls.")
    return found


def _local_source(name: str, split: str, where: str) -> Source:
    path = Path(name)
    if not path.exists():
        raise DataError(f"{where}={name}: there is no such file.{nearest_file(path)} Fix: correct the path.")
    what = not_a_file(path)
    if what is not None:
        raise DataError(f"{where}={name}: is {what}: it can't be read twice. Fix: write the rows to a file first.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{where}={name}: may not be read by this user. Fix: chmod +r, or copy the file.")
    if path.is_dir():
        _require_saved_dataset(path, name, where)
        return Source(
            name,
            _folder_identity(path, split),
            lambda _: _load_folder(path, name, split, where),
            look_again=lambda: _folder_identity(path, split),
            stream=lambda start: _load_folder(path, name, split, where).rows_from(start),
        )
    suffix = _suffix(path, where)
    loaders: dict[str, Callable[[Path], RawRows]] = {
        ".json": lambda work: load_raw(json_rows(path), name, work),
        ".jsonl": lambda work: load_raw(jsonl_rows(path), name, work),
        ".csv": lambda work: load_raw(csv_rows(path), name, work),
        ".parquet": lambda work: _load_typed(path, name, work),
        ".arrow": lambda work: _load_typed(path, name, work),
    }
    return Source(
        name,
        _identity(path, [path]),
        loaders[suffix],
        lines=path if path.name.lower().endswith(".jsonl") else None,
        look_again=lambda: _identity(path, [path]),
        stream=lambda start: file_rows(path, suffix, start),
    )


def _suffix(path: Path, where: str = "dataset_path") -> str:
    """Return the suffix that says what kind of file it is, without a final `.gz`."""
    name = path.name.lower()
    found = [suffix for suffix in SUPPORTED_SUFFIXES if name.endswith(suffix)]
    if not found:
        raise DataError(
            f"{where}={path}: files of this kind can't be read; supported are {', '.join(SUPPORTED_SUFFIXES)} "
            "and folders written by save_to_disk. Fix: convert the file, e.g. to JSONL."
        )
    return found[0].removesuffix(".gz")


def _folder_identity(path: Path, split: str) -> dict[str, Any]:
    files = sorted(part for part in path.rglob("*") if part.is_file())
    return {**_identity(path, files), "split": split}


def _identity(path: Path, files: Sequence[Path]) -> dict[str, Any]:
    stats = [(str(file.relative_to(path)) if file != path else "", file.stat()) for file in files]
    return {"path": str(path.resolve()), "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder was written by `datasets`' `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _require_saved_dataset(path: Path, name: str, where: str) -> None:
    if is_saved_dataset(path):
        return
    files = [str(part) for part in sorted(path.iterdir()) if part.name.lower().endswith(SUPPORTED_SUFFIXES)]
    found = f" It holds {', '.join(files[:5])}." if files else ""
    raise DataError(
        f"{where}={name}: is a folder, but not one written by datasets' save_to_disk.{found} "
        f"Fix: name the files, or a pattern such as '{name.rstrip('/')}/*.jsonl'."
    )


# --- Typed files ---------------------------------------------------------------------------------------------------


def _load_folder(path: Path, name: str, split: str, where: str) -> RawRows:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (ValueError, OSError, KeyError) as error:
        raise _unreadable(name, error) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(
                f"{where}={name}: holds no split {split!r}, but {', '.join(dataset)}. "
                f"Fix: {'--dataset_train_split NAME' if where == 'dataset_path' else 'split: NAME'}, or name the "
                "split's own folder."
            )
        dataset = dataset[split]
    return RawRows(require_rows(dataset, name), is_json=False)


def _load_typed(path: Path, name: str, work_dir: Path) -> RawRows:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    cache = str(work_dir / "typed")
    try:
        if _suffix(path) == ".arrow":
            try:
                dataset = datasets.Dataset.from_file(str(path))
            except pa.ArrowInvalid:
                # Arrow's "file" layout (with a footer), which `Dataset.from_file` can't map into memory.
                dataset = datasets.load_dataset("arrow", data_files=[str(path)], split="train", cache_dir=cache)
        else:
            metadata = pq.read_metadata(path)
            _require_few_columns(metadata.num_columns, name)
            _require_bounded(metadata, path, name)
            # `datasets` fails on an empty file with a message about batch sizes.
            dataset = [] if metadata.num_rows == 0 else datasets.Dataset.from_parquet(str(path), cache_dir=cache)
    except DataError:
        raise
    except (ValueError, OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(name, error.__cause__ or error) from error
    rows = require_rows(dataset, name)
    _require_few_columns(len(rows.column_names), name)
    return RawRows(rows, is_json=False)


def _require_bounded(metadata: Any, path: Path, name: str) -> None:
    """Refuse a Parquet file that holds more than its size can: by its own footer, before any row is read.

    A column that repeats one value takes no bytes to speak of, so its rows count as well.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    unpacked = max(sum(group.total_byte_size for group in groups), metadata.num_rows * metadata.num_columns)
    most = most_unpacked_bytes(path.stat().st_size)
    if unpacked > most:
        raise DataError(
            f"{name}: unpacks to {unpacked:,} bytes or more, from a file of {path.stat().st_size:,}. Fix: look at what "
            "it holds; if it is sound, write its rows as JSONL."
        )


def _require_few_columns(count: int, name: str) -> None:
    if count > MAX_COLUMNS:
        raise DataError(
            f"{name}: has {count:,} columns, more than {MAX_COLUMNS:,}. Fix: keep the columns that are read, such as "
            "prompt, chosen and rejected."
        )


def _unreadable(name: str, error: BaseException) -> DataError:
    return DataError(
        f"{name}: can't be read: {first_line(error)}. Fix: check that the file is complete and of the kind "
        "its name says."
    )


def require_rows(dataset: Any, name: str) -> Any:
    """Return the rows of a source.

    Raises:
        DataError: there are none.
    """
    if len(dataset) == 0:
        raise without_rows(name)
    return dataset


def without_rows(name: str) -> DataError:
    """Return the error for a source without rows."""
    return DataError(f"{name}: has no rows. Fix: give a file with at least one preference.")


# --- Text files ----------------------------------------------------------------------------------------------------


def load_raw(rows: Iterator[RawRow], name: str, work_dir: Path) -> RawRows:
    """Write raw rows to an Arrow file, so that they can be mapped into memory and read by several processes.

    Args:
        rows: what to write.
        name: of the source, for messages.
        work_dir: folder of the file.

    Raises:
        DataError: there is none, or what they come from is damaged.
    """
    import datasets
    import pyarrow as pa

    schema = pa.schema([("row", pa.int64()), ("raw", pa.large_binary()), ("problem", pa.string())])
    path = work_dir / "raw.arrow"
    if not path.exists():
        try:
            with (
                replacing(path) as aside,
                pa.OSFile(str(aside), "wb") as sink,
                pa.ipc.new_stream(sink, schema) as writer,
            ):
                for batch in _batched(rows):
                    columns = list(zip(*batch, strict=True))
                    writer.write_batch(
                        pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema)
                    )
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _unreadable(name, error) from error
    return RawRows(require_rows(datasets.Dataset.from_file(str(path)), name), is_json=True)


def _batched(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _WRITE_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch

"""Local files and hub data sets as raw rows that can be read in parallel, with every bad row kept and counted.

JSON and CSV are read line by line with Python's own parsers into an Arrow file of raw rows: libraries that infer a
column's type from the first rows crash on, or silently convert, whatever differs later. Parquet, Arrow and hub data
carry their types with them and go through `datasets`. Nothing here holds a whole data set in memory.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from rm_scale.data.groups import RejectedRow
from rm_scale.errors import DataError

SUPPORTED_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".arrow")
# Cells of these CSV columns hold numbers or lists; all others stay the text they are.
CSV_JSON_COLUMNS = frozenset(
    [
        "margin",
        "soft_label",
        "chosen_probability",
        "preference_probability",
        "ranks",
        "scores",
        "responses",
        "completions",
    ]
)
SAMPLE_ROWS = 200
_WRITE_ROWS = 1000
_READ_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class RawRows:
    """The rows of one source as a memory-mapped `datasets.Dataset`.

    Attributes:
        dataset: columns `row`, `raw` (JSON bytes) and `problem` if `is_json`; otherwise the source's own columns.
        is_json: whether rows still have to be parsed.
    """

    dataset: Any
    is_json: bool

    def decode(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> list[tuple[int, Any]]:
        """Pairs of row index and row for one batch of `dataset`; a row that can't be read is a `RejectedRow`."""
        if self.is_json:
            return [
                (row, _parse(raw, problem))
                for row, raw, problem in zip(batch["row"], batch["raw"], batch["problem"], strict=True)
            ]
        names = list(batch)
        columns = zip(*(batch[name] for name in names), strict=True)
        return [(index, dict(zip(names, values, strict=True))) for index, values in zip(indices, columns, strict=True)]

    def sample(self, num_rows: int = SAMPLE_ROWS) -> list[dict[str, Any]]:
        """The first rows that are readable objects.

        Raises:
            DataError: none is; says what is wrong with the first one.
        """
        count = min(num_rows, len(self.dataset))
        rows = [row for _, row in self.decode(self.dataset[:count], range(count))]
        readable = [row for row in rows if isinstance(row, dict)]
        if not readable:
            seen = str(rows[0]) if isinstance(rows[0], RejectedRow) else f"a value that is no object: {rows[0]!r:.80}"
            raise DataError(
                f"none of the first {count} rows is a readable object; the first is {seen}. "
                "Fix: check the file's kind; each row must be an object with columns, e.g. prompt, chosen, rejected."
            )
        return readable

    def columns(self, sample: Sequence[Mapping[str, Any]]) -> list[str]:
        """Column names in order: those declared, or for JSON those seen in the sample."""
        if not self.is_json:
            return list(self.dataset.column_names)
        return list(dict.fromkeys(name for row in sample for name in row))


@dataclass(frozen=True)
class Source:
    """One file, folder or hub split to read.

    Attributes:
        name: how it is called in reports: the path as given, or hub name and split.
        identity: what must be unchanged for cached results to hold, as JSON values.
        load: reads it, with room for temporary files in the folder given.
    """

    name: str
    identity: dict[str, Any]
    load: Callable[[Path], RawRows] = field(repr=False, compare=False)


# --- Finding sources -----------------------------------------------------------------------------------------------


def local_sources(paths: Sequence[str], split: str = "train") -> list[Source]:
    """Sources for files, patterns such as `data/*.jsonl`, and folders written by `datasets`' `save_to_disk`.

    Args:
        split: which split to take from a folder that holds several.

    Raises:
        DataError: a file is missing, or its suffix is not supported.
    """
    return [_local_source(name, split) for path in paths for name in _expand(path)]


def hub_source(name: str, config: str | None, split: str) -> Source:
    """Source for one split of a hub data set.

    Raises:
        DataError: there is no such data set, configuration or split, or the hub can't be reached.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(_hub_error_text(name, config, split, error)) from error
    label = f"{name}[{split}]" if config is None else f"{name}/{config}[{split}]"
    identity = {"hub": name, "config": config, "split": split, "fingerprint": dataset._fingerprint}
    return Source(label, identity, lambda _: RawRows(_require_rows(dataset, label), is_json=False))


def _expand(path: str) -> list[str]:
    if Path(path).exists() or not glob.has_magic(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise DataError(f"dataset_path={path}: the pattern matches no file. Fix: check it with ls.")
    return found


def _local_source(name: str, split: str) -> Source:
    path = Path(name)
    if not path.exists():
        raise DataError(f"dataset_path={name}: there is no such file.{_nearest_file(path)} Fix: correct the path.")
    if not os.access(path, os.R_OK):
        raise DataError(f"dataset_path={name}: may not be read by this user. Fix: chmod +r, or copy the file.")
    if path.is_dir():
        _require_saved_dataset(path, name)
        files = sorted(part for part in path.rglob("*") if part.is_file())
        return Source(name, {**_identity(path, files), "split": split}, lambda _: _load_folder(path, name, split))
    suffix = _suffix(path)
    loaders: dict[str, Callable[[Path], RawRows]] = {
        ".json": lambda work: _load_raw(_json_rows(path), name, work),
        ".jsonl": lambda work: _load_raw(_jsonl_rows(path), name, work),
        ".csv": lambda work: _load_raw(_csv_rows(path), name, work),
        ".parquet": lambda work: _load_typed(path, name, work),
        ".arrow": lambda work: _load_typed(path, name, work),
    }
    return Source(name, _identity(path, [path]), loaders[suffix])


def _suffix(path: Path) -> str:
    """The kind of file, without a final `.gz`."""
    name = path.name.lower()
    found = [suffix for suffix in SUPPORTED_SUFFIXES if name.endswith(suffix)]
    if not found:
        raise DataError(
            f"dataset_path={path}: files of this kind can't be read; supported are {', '.join(SUPPORTED_SUFFIXES)} "
            "and folders written by save_to_disk. Fix: convert the file, e.g. to JSONL."
        )
    return found[0].removesuffix(".gz")


def _identity(path: Path, files: Sequence[Path]) -> dict[str, Any]:
    stats = [(str(file.relative_to(path)) if file != path else "", file.stat()) for file in files]
    return {"path": str(path.resolve()), "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    names = sorted(part.name for part in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f" Nearest name there: {path.parent / close[0]}." if close else ""


def _require_saved_dataset(path: Path, name: str) -> None:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return
    files = [str(part) for part in sorted(path.iterdir()) if part.name.lower().endswith(SUPPORTED_SUFFIXES)]
    found = f" It holds {', '.join(files[:5])}." if files else ""
    raise DataError(
        f"dataset_path={name}: is a folder, but not one written by datasets' save_to_disk.{found} "
        f"Fix: name the files, or a pattern such as '{name.rstrip('/')}/*.jsonl'."
    )


def _hub_error_text(name: str, config: str | None, split: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = (
        f"dataset_name={name} (dataset_config={config}, split={split}): can't be loaded from the hub or its cache: "
        f"{' '.join(lines[:3])} "
    )
    if "split" in lines[0].lower():
        return text + "Fix: --dataset_train_split or --dataset_test_split with one of the splits above."
    if "config" in lines[0].lower():
        return text + "Fix: --dataset_config with one of the configurations above."
    return text + "Fix: check the name (OWNER/NAME) and the network, or give local files with --dataset_path."


# --- Typed files ---------------------------------------------------------------------------------------------------


def _load_folder(path: Path, name: str, split: str) -> RawRows:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (ValueError, OSError, KeyError) as error:
        raise _unreadable(name, error) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(
                f"dataset_path={name}: holds no split {split!r}, but {', '.join(dataset)}. "
                "Fix: --dataset_train_split NAME, or name the split's own folder."
            )
        dataset = dataset[split]
    return RawRows(_require_rows(dataset, name), is_json=False)


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
                # The other Arrow layout ("file" with a footer), which can't be mapped as it is.
                dataset = datasets.load_dataset("arrow", data_files=[str(path)], split="train", cache_dir=cache)
        else:
            # `datasets` fails on an empty file with a message about batch sizes.
            empty = pq.read_metadata(path).num_rows == 0
            dataset = [] if empty else datasets.Dataset.from_parquet(str(path), cache_dir=cache)
    except (ValueError, OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(name, error.__cause__ or error) from error
    return RawRows(_require_rows(dataset, name), is_json=False)


def _unreadable(name: str, error: BaseException) -> DataError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{name}: can't be read: {first}. Fix: check that the file is complete and of the kind its name says."
    )


def _require_rows(dataset: Any, name: str) -> Any:
    if len(dataset) == 0:
        raise DataError(f"{name}: has no rows. Fix: give a file with at least one preference.")
    return dataset


# --- Text files ----------------------------------------------------------------------------------------------------

RawRow = tuple[int, bytes, str]
"""Row index, JSON text, and the reason why the row could not even be split off ("" if it could)."""


def _load_raw(rows: Iterator[RawRow], name: str, work_dir: Path) -> RawRows:
    """Write raw rows to an Arrow file, so that they can be mapped into memory and read by several processes."""
    import datasets
    import pyarrow as pa

    schema = pa.schema([("row", pa.int64()), ("raw", pa.large_binary()), ("problem", pa.string())])
    path = work_dir / "raw.arrow"
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batched(rows):
                columns = list(zip(*batch, strict=True))
                writer.write_batch(
                    pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema)
                )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from error
    return RawRows(_require_rows(datasets.Dataset.from_file(str(path)), name), is_json=True)


def _batched(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _WRITE_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _parse(raw: bytes, problem: str) -> Any:
    """A row's value, or the `RejectedRow` that says why it can't be read."""
    if problem:
        return RejectedRow("bad_csv", problem)
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RejectedRow("bad_unicode", f"byte {error.start} of the row is not UTF-8")
    except (ValueError, RecursionError) as error:
        return RejectedRow("bad_json", f"{error}")


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    """One row per line that isn't blank; the index counts lines from 0, so that an editor finds it."""
    with _open(path) as stream:
        for index, line in enumerate(stream):
            line = (line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line).strip()
            if line:
                yield index, line, ""


def _json_rows(path: Path) -> Iterator[RawRow]:
    """A `.json` file is a list of rows, or one row per line."""
    with _open(path) as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        _require_whole_first_line(path)
        yield from _jsonl_rows(path)
        return
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
        for index, element in enumerate(_list_elements(text, path)):
            yield index, element.encode("utf-8", errors="surrogateescape"), ""


def _require_whole_first_line(path: Path) -> None:
    first = next(_jsonl_rows(path), None)
    if first is not None and first[1].endswith((b"{", b"[", b",")):
        raise DataError(
            f"{path}: is one JSON object spread over several lines, not a list of rows. "
            "Fix: store a list [{...}, {...}], or one row per line (JSONL)."
        )


def _list_elements(stream: IO[str], path: Path) -> Iterator[str]:
    """The JSON texts of a list's elements, read in pieces so that the file may be larger than memory."""
    reader = _Window(stream)
    reader.skip("[")
    if reader.peek() == "]":
        return
    while True:
        try:
            yield reader.element()
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{path}: is not valid JSON near character {reader.position}: {error}. Fix: correct the file there, or "
                "store one row per line (JSONL), where a bad row is counted and the others are used."
            ) from error
        follows = reader.peek()
        if follows == "]":
            return
        if follows != ",":
            seen = "the end of the file" if follows == "" else repr(follows)
            raise DataError(
                f"{path}: is not valid JSON near character {reader.position}: expected ',' or ']', found {seen}. "
                "Fix: correct the file there (is it complete?)."
            )
        reader.skip(",")


class _Window:
    """A piece of a text stream that grows until the next JSON value fits in it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._buffer = ""
        self._start = 0
        self._dropped = 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    @property
    def position(self) -> int:
        """Characters of the stream that lie behind."""
        return self._dropped + self._start

    def peek(self) -> str:
        """The next character that isn't white space, "" at the end; stands on it afterwards."""
        while True:
            found = re.compile(r"\S").search(self._buffer, self._start)
            if found:
                self._start = found.start()
                return found.group()
            self._start = len(self._buffer)
            if not self._grow():
                return ""

    def skip(self, expected: str) -> None:
        assert self.peek() == expected
        self._start += 1

    def element(self) -> str:
        """The text of the next JSON value."""
        self.peek()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._buffer, self._start)
            except json.JSONDecodeError:
                if not self._grow():
                    raise
                continue
            # A number at the end of the window may go on behind it.
            if end < len(self._buffer) or not self._grow():
                text = self._buffer[self._start : end]
                self._start = end
                return text

    def _grow(self) -> bool:
        """Read on, at least doubling what is held, so that long values cost linear time."""
        if self._ended:
            return False
        rest = self._buffer[self._start :]
        more = self._stream.read(max(_READ_CHARACTERS, len(rest)))
        self._dropped += self._start
        self._buffer, self._start, self._ended = rest + more, 0, not more
        return bool(more)


def _csv_rows(path: Path) -> Iterator[RawRow]:
    """One row per record after the header; every cell is text but for the columns of `CSV_JSON_COLUMNS`."""
    csv.field_size_limit(sys.maxsize)
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{path}: the header names {', '.join(repeated)} twice. Fix: rename one of the columns.")
        index = 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield index, b"", f"line {reader.line_num}: {error}"
            else:
                if not cells:
                    continue
                wrong = f"{len(cells)} cells, the header has {len(header)}" if len(cells) != len(header) else ""
                row = {name: _csv_cell(name, cell) for name, cell in zip(header, cells, strict=False)}
                yield index, json.dumps(row).encode(), wrong
            index += 1


def _csv_cell(name: str, cell: str) -> Any:
    if name not in CSV_JSON_COLUMNS:
        return cell
    try:
        return json.loads(cell) if cell.strip() else None
    except (ValueError, RecursionError):
        return cell

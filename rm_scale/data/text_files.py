"""Read JSON, JSONL and CSV files, plain or gzipped, as raw rows: JSON bytes that `parse_row` turns into values.

A bad row is kept with the reason, so that it is counted and the others are used. No file is held in memory whole, and
none keeps a machine busy without end: rows, columns and what a gzip file unpacks to have limits.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError
from rm_scale.texts import one_line

# Cells of these CSV columns are read as JSON (numbers or lists); all others stay text.
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
_READ_CHARACTERS = 1 << 20
MAX_ROW_BYTES = 16 << 20
"""Of one row: about four million tokens, more than any model reads."""
MAX_COLUMNS = 10_000
# A line over the limit is skipped, but not for ever: a sparse file or a gzip file may have no end in reach.
_MAX_SKIPPED_BYTES = 1 << 30
MOST_LINE_BYTES = MAX_ROW_BYTES + _MAX_SKIPPED_BYTES
"""Of a line that is looked at; a longer one ends the reading of its file."""
# Text shrinks to a tenth or so. What unpacks to more than this, and to this many times its size, was made to be large.
_MAX_UNPACKED_BYTES = 1 << 30
_MAX_UNPACKED_RATIO = 200

RawRow = tuple[int, bytes, str]
"""Row index, JSON text, and what is wrong with the row as "reason: detail" ("" if nothing)."""


def parse_row(raw: bytes, problem: str) -> Any:
    """Return a raw row's value, or the `RejectedRow` that says why it can't be read."""
    if problem:
        reason, _, detail = problem.partition(": ")
        return RejectedRow(reason, detail)
    try:
        value = json.loads(raw.decode("utf-8"))
        if b"\\u" in raw:
            # JSON may spell half of a UTF-16 pair. No file, tokenizer or terminal takes it, wherever in the row it is.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return RejectedRow("bad_unicode", f"byte {error.start} of the row is not UTF-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return RejectedRow("bad_unicode", f"the row holds a lone surrogate, {half!a}")
    except (ValueError, RecursionError) as error:
        return RejectedRow("bad_json", f"{error}")
    if isinstance(value, dict) and len(value) > MAX_COLUMNS:
        return RejectedRow("too_large", f"the row has {len(value):,} columns, more than {MAX_COLUMNS:,}")
    return value


def _too_large(what: str = "the row") -> str:
    return f"too_large: {what} has more than {MAX_ROW_BYTES >> 20} MB"


def most_unpacked_bytes(size: int) -> int:
    """Return what a file of a size may unpack to: more, and it was made to fill a machine."""
    return max(_MAX_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * size)


def _open(path: Path) -> IO[bytes]:
    if not path.name.lower().endswith(".gz"):
        return path.open("rb")
    return cast(IO[bytes], io.BufferedReader(_Unpacked(path), _READ_CHARACTERS))


class _Unpacked(io.RawIOBase):
    """A gzip file's content, which ends with an error when the file was made to unpack without end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = gzip.GzipFile(path, "rb")
        self._most = most_unpacked_bytes(path.stat().st_size)
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._read += count
        if self._read > self._most:
            raise DataError(
                f"{self._path}: unpacks to more than {_MAX_UNPACKED_RATIO} times its size, {self._most:,} bytes so "
                "far. Fix: look at what it holds; if it is sound, unpack it with gunzip and give that file."
            )
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def jsonl_rows(path: Path, start: int = 0, end: int | None = None, first_row: int = 0) -> Iterator[RawRow]:
    """Yield one row per line that isn't blank. Its index is the line's number, from 0, as editors find it.

    Args:
        path: the file.
        start, end: bytes of it to read, which lines begin and end at; an uncompressed file's alone.
        first_row: number of the first line there.
    """
    with _open(path) as stream:
        if start:
            stream.seek(start)
        index, place = first_row, start
        while (end is None or place < end) and (line := stream.readline(MAX_ROW_BYTES + 1)):
            place += len(line)
            if len(line) > MAX_ROW_BYTES:
                if not line.endswith(b"\n"):
                    place += _skip_line(stream, path, index)
                yield index, b"", _too_large()
            else:
                line = (line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line).strip()
                if line:
                    yield index, line, ""
            index += 1


def _skip_line(stream: IO[bytes], path: Path, index: int) -> int:
    """Go to the end of a line; return the bytes on the way."""
    skipped = 0
    for _ in range(_MAX_SKIPPED_BYTES // _READ_CHARACTERS):
        part = stream.readline(_READ_CHARACTERS)
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            return skipped
    raise line_too_long(path, index)


def line_too_long(path: Path, index: int) -> DataError:
    """Return the error for a line over `MOST_LINE_BYTES`."""
    return DataError(
        f"{path}: line {index + 1} has more than {_MAX_SKIPPED_BYTES >> 20} MB. Fix: check that the file is text, one "
        "row per line."
    )


def json_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a `.json` file, which is a list of rows or has one row per line."""
    with _open(path) as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        _require_whole_first_line(path)
        yield from jsonl_rows(path)
        return
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
        for index, element in enumerate(_list_elements(text, path)):
            yield index, element.encode("utf-8", errors="surrogateescape"), ""


def _require_whole_first_line(path: Path) -> None:
    first = next(jsonl_rows(path), None)
    if first is not None and first[1].endswith((b"{", b"[", b",")):
        raise DataError(
            f"{path}: is one JSON object spread over several lines, not a list of rows. "
            "Fix: store a list [{...}, {...}], or one row per line (JSONL)."
        )


def _list_elements(stream: IO[str], path: Path) -> Iterator[str]:
    """Yield the JSON text of each element of a list; the file may be larger than memory."""
    reader = _JsonWindow(stream)
    reader.skip("[")
    if reader.peek() == "]":
        return
    while True:
        try:
            yield reader.element()
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
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


class _JsonWindow:
    """The part of a text stream that is in memory: it grows until the next JSON value fits in it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._buffer = ""
        self._start = 0
        self._dropped = 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    @property
    def position(self) -> int:
        """Number of characters of the stream before the current place."""
        return self._dropped + self._start

    def peek(self) -> str:
        """Move to the next character that isn't white space and return it, without going past it; "" at the end."""
        while True:
            found = re.compile(r"\S").search(self._buffer, self._start)
            if found:
                self._start = found.start()
                return found.group()
            self._start = len(self._buffer)
            if not self._grow():
                return ""

    def skip(self, expected: str) -> None:
        """Move past a character that `peek` has just returned."""
        assert self.peek() == expected
        self._start += 1

    def element(self) -> str:
        """Return the text of the next JSON value and move past it."""
        self.peek()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._buffer, self._start)
            except json.JSONDecodeError as error:
                if len(self._buffer) - self._start > MAX_ROW_BYTES:
                    raise ValueError(f"{error.msg}, or a row of more than {MAX_ROW_BYTES >> 20} MB") from error
                if not self._grow():
                    raise
                continue
            # A number that ends where the window ends may have more digits in the stream.
            if end < len(self._buffer) or not self._grow():
                text = self._buffer[self._start : end]
                self._start = end
                return text

    def _grow(self) -> bool:
        """Read more, at least as much as is held, so that long values take linear time; return False at the end."""
        if self._ended:
            return False
        rest = self._buffer[self._start :]
        more = self._stream.read(max(_READ_CHARACTERS, len(rest)))
        self._dropped += self._start
        self._buffer, self._start, self._ended = rest + more, 0, not more
        return bool(more)


def csv_rows(path: Path) -> Iterator[RawRow]:
    """Yield one row per record after the header; cells are text, but for the columns of `CSV_JSON_COLUMNS`."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(_csv_lines(text, path), strict=True)
        header = _csv_header(reader, path)
        index = 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "field limit" in str(error):  # where the next record begins is not known then
                    raise DataError(
                        f"{path}: line {reader.line_num}: a cell has more than {MAX_ROW_BYTES >> 20} MB. Fix: close "
                        "the quote that is open there, or take the row out."
                    ) from error
                yield index, b"", f"bad_csv: line {reader.line_num}: {error}"
            else:
                if not cells:
                    continue
                yield _csv_row(index, header, cells)
            index += 1


def _csv_lines(text: IO[str], path: Path) -> Iterator[str]:
    number = 0
    while line := text.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{path}: line {number} has more than {MAX_ROW_BYTES >> 20} MB. Fix: check that the file is CSV, or "
                "take out that line."
            )
        yield line


def _csv_header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}: the header can't be read: {error}. Fix: correct the first line.") from error
    if len(header) > MAX_COLUMNS:
        raise DataError(
            f"{path}: the header names {len(header):,} columns, more than {MAX_COLUMNS:,}. Fix: keep the columns "
            "that are read, such as prompt, chosen and rejected."
        )
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated:
        raise DataError(
            f"{path}: the header names {one_line(', '.join(repeated), 200)} twice. Fix: rename one of them."
        )
    return header


def _csv_row(index: int, header: list[str], cells: list[str]) -> RawRow:
    if len(cells) != len(header):
        return index, b"", f"bad_csv: {len(cells)} cells, the header has {len(header)}"
    raw = json.dumps({name: _csv_cell(name, cell) for name, cell in zip(header, cells, strict=True)}).encode()
    return (index, raw, "") if len(raw) <= MAX_ROW_BYTES else (index, b"", _too_large())


def _csv_cell(name: str, cell: str) -> Any:
    if name not in CSV_JSON_COLUMNS:
        return cell
    try:
        return json.loads(cell) if cell.strip() else None
    except (ValueError, RecursionError):
        return cell

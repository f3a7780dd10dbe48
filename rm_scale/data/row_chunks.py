"""Cut the rows of a source into chunks that several processes encode, each read by itself.

Lines of an uncompressed JSONL file are cut by their bytes, so that every process reads its part of the file and nothing
else; other sources by their rows. Where the cuts lie depends on the source alone, never on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rm_scale.data.row_readers import is_read_by_rows, open_source
from rm_scale.data.sources import SAMPLE_ROWS, RawRows, Source, columns_of, readable_rows, without_rows
from rm_scale.data.text_files import MOST_LINE_BYTES, jsonl_rows, line_too_long, parse_row
from rm_scale.errors import DataError

MOST_CHUNKS = 2_000
"""Of one source, about: each is a folder of a few files. Those of larger sources are larger."""
_CHUNK_BYTES = (1 << 20, 64 << 20)
_CHUNK_ROWS = (2_000, 50_000)
_BATCH_ROWS = 512
_BATCH_BYTES = 4 << 20
_SCAN_BYTES = 256 << 10

Rows = list[tuple[int, Any]]
"""Index and value of each; a row that can't be read is a `RejectedRow`."""


class Chunk(NamedTuple):
    """A part of a source.

    Attributes:
        start, end: its first byte or row, and the one behind its last.
        first_row: index of its first row.
        num_rows: its rows, blank lines counted.
    """

    start: int
    end: int
    first_row: int
    num_rows: int


class ChunkedRows(Protocol):
    """The rows of a source, to be read chunk by chunk."""

    @property
    def told(self) -> str:
        """What became of the file's rows before they are read, in words; "" where they are read as they are."""
        ...

    @property
    def preset(self) -> str | None:
        """The preset by which they were put together, if the columns told it."""
        ...

    def cut(self) -> list[Chunk]:
        """Return the chunks that make up the source."""
        ...

    def batches(self, chunk: Chunk) -> Iterator[Rows]:
        """Yield the rows of a chunk, in order, as many as are encoded at once."""
        ...

    def sample(self) -> list[dict[str, Any]]:
        """Return those of the first rows that are readable objects.

        Raises:
            DataError: none of them is.
        """
        ...

    def columns(self, sample: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the column names in order."""
        ...


def open_rows(source: Source, work: Path) -> ChunkedRows:
    """Return the rows of a source.

    Args:
        source: what to read.
        work: folder for what must be unpacked first; what an earlier call has finished there is used again.

    Raises:
        DataError: it can't be read, or has no rows.
    """
    if source.lines is not None:
        rows = LineRows(source.lines, source.name)
        if is_read_by_rows(source, rows.columns(rows.sample())):
            return rows
    return TableRows(open_source(source, work), source.name)


@dataclass(frozen=True)
class LineRows:
    """The rows of an uncompressed JSONL file.

    Attributes:
        path: the file.
        name: the source's.
    """

    path: Path
    name: str

    @property
    def told(self) -> str:
        """See `ChunkedRows`."""
        return ""

    @property
    def preset(self) -> str | None:
        """See `ChunkedRows`."""
        return None

    def cut(self) -> list[Chunk]:
        """See `ChunkedRows`."""
        size = _within(self.path.stat().st_size // MOST_CHUNKS, _CHUNK_BYTES)
        chunks: list[Chunk] = []
        start = first = place = line = last_line_end = 0
        with self.path.open("rb") as stream:
            while block := stream.read(_SCAN_BYTES):
                newline = block.rfind(b"\n")
                if newline < 0:
                    if place + len(block) - last_line_end > MOST_LINE_BYTES:
                        raise line_too_long(self.path, line)
                elif place + newline + 1 - start >= size:
                    end, lines = place + newline + 1, line + block.count(b"\n")
                    chunks.append(Chunk(start, end, first, lines - first))
                    start, first = end, lines
                line += block.count(b"\n")
                last_line_end = place + newline + 1 if newline >= 0 else last_line_end
                place += len(block)
        if place > start:
            chunks.append(Chunk(start, place, first, line - first + (last_line_end < place)))
        return chunks

    def batches(self, chunk: Chunk) -> Iterator[Rows]:
        """See `ChunkedRows`."""
        rows: Rows = []
        size = 0
        for index, raw, problem in jsonl_rows(self.path, chunk.start, chunk.end, chunk.first_row):
            rows.append((index, parse_row(raw, problem)))
            size += len(raw)
            if len(rows) == _BATCH_ROWS or size >= _BATCH_BYTES:
                yield rows
                rows, size = [], 0
        if rows:
            yield rows

    def sample(self) -> list[dict[str, Any]]:
        """See `ChunkedRows`."""
        rows = [parse_row(raw, problem) for _, raw, problem in islice(jsonl_rows(self.path), SAMPLE_ROWS)]
        if not rows:
            raise without_rows(self.name)
        with _named(self.name):
            return readable_rows(rows)

    def columns(self, sample: Sequence[Mapping[str, Any]]) -> list[str]:
        """See `ChunkedRows`."""
        return columns_of(sample)


@dataclass(frozen=True)
class TableRows:
    """The rows of a source that lies in an Arrow table.

    Attributes:
        raw: the rows.
        name: the source's.
    """

    raw: RawRows
    name: str

    @property
    def told(self) -> str:
        """See `ChunkedRows`."""
        return self.raw.told

    @property
    def preset(self) -> str | None:
        """See `ChunkedRows`."""
        return self.raw.preset

    def cut(self) -> list[Chunk]:
        """See `ChunkedRows`."""
        count = len(self.raw.dataset)
        size = _within(count // MOST_CHUNKS, _CHUNK_ROWS)
        return [
            Chunk(start, min(start + size, count), start, min(size, count - start)) for start in range(0, count, size)
        ]

    def batches(self, chunk: Chunk) -> Iterator[Rows]:
        """See `ChunkedRows`."""
        for start in range(chunk.start, chunk.end, _BATCH_ROWS):
            indices = range(start, min(start + _BATCH_ROWS, chunk.end))
            yield self.raw.decode(self.raw.dataset[start : indices.stop], indices)

    def sample(self) -> list[dict[str, Any]]:
        """See `ChunkedRows`."""
        with _named(self.name):
            return self.raw.sample()

    def columns(self, sample: Sequence[Mapping[str, Any]]) -> list[str]:
        """See `ChunkedRows`."""
        return self.raw.columns(sample)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _within(value: int, bounds: tuple[int, int]) -> int:
    least, most = bounds
    return min(max(value, least), most)

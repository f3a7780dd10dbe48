"""Read the rows of a source one after the other: as they stand in its file, and as the groups that they are read as."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.data.encoded_rows import read_row
from rm_scale.data.formats import RowReader
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_readers import choose_reader, open_source
from rm_scale.data.sources import RawRows, Source

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source.

    Attributes:
        name: of the source.
        raw: its rows.
        reader: turns a row into a group.
    """

    name: str
    raw: RawRows
    reader: RowReader

    @classmethod
    def open(cls, source: Source, work: Path) -> SourceRows:
        """Open a source.

        Args:
            source: what to read.
            work: a folder of its own for temporary files; it must stay until the last row is read.

        Raises:
            DataError: the source can't be read, or fits no format.
        """
        raw = open_source(source, work)
        reader, _ = choose_reader(source, raw, raw.sample())
        return cls(source.name, raw, reader)

    def __len__(self) -> int:
        return len(self.raw.dataset)

    def __iter__(self) -> Iterator[tuple[int, PreferenceGroup | RejectedRow]]:
        """Yield each row's number and its group, or why it can't be read."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            for row, value in self.values(start, min(start + _ROWS_AT_ONCE, len(self))):
                yield row, read_row(self.reader, value, row)

    def values(self, start: int, stop: int) -> list[tuple[int, Any]]:
        """Return number and value of the rows from `start` to `stop`; a `RejectedRow` for one that is no JSON."""
        return self.raw.decode(self.raw.dataset[start:stop], range(start, stop))

"""Hold output rows on disk until all are known: Parquet and CSV must see every column before they begin."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_ROWS_PER_PART = 512


class RowSpool:
    """Rows in a temporary file.

    Args:
        folder: where that file is, best where the output goes: there must be space for it anyway.
    """

    def __init__(self, folder: Path) -> None:
        # Without a name: it is gone with the process, whatever ends it.
        self.stream = tempfile.TemporaryFile(mode="w+", encoding="utf-8", dir=folder)  # noqa: SIM115
        self.starts: list[int] = []
        self.num_rows = 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        if self.num_rows % _ROWS_PER_PART == 0:
            self.starts.append(self.stream.tell())
        self.stream.write(json.dumps(row) + "\n")
        self.num_rows += 1

    def parts(self) -> list[SpoolPart]:
        """Return all rows, in parts as `rm_scale.inference.scoring.row_files.write_rows` takes them."""
        return [SpoolPart(self, number) for number in range(len(self.starts))]


class SpoolPart:
    """Some rows of a spool, which can be read again and again."""

    def __init__(self, spool: RowSpool, number: int) -> None:
        self.spool = spool
        self.number = number

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.spool.stream.seek(self.spool.starts[self.number])
        count = min(_ROWS_PER_PART, self.spool.num_rows - self.number * _ROWS_PER_PART)
        lines = [self.spool.stream.readline() for _ in range(count)]
        return (json.loads(line) for line in lines)

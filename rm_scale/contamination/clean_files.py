"""Write the training rows that match other files, and why; and the training data without them."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import IO, Any

from rm_scale.contamination.compare import ComparedRow
from rm_scale.contamination.source_rows import SourceRows
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.sources import SUPPORTED_SUFFIXES
from rm_scale.errors import DataError
from rm_scale.files import replacing

_SHOWN_MATCHES = 5


class CleanFiles:
    """Receives all training rows in order and writes each to one side. Use `open`.

    Attributes:
        dropped: rows written as dropped.
        kept: rows written as kept, per file.
    """

    def __init__(self, drop: IO[str] | None, kept: Path | None, stack: contextlib.ExitStack) -> None:
        self._drop = drop
        self._folder = kept
        self._stack = stack
        self._files: dict[str, tuple[Path, IO[str]]] = {}
        self.dropped = 0
        self.kept: Counter[Path] = Counter()

    @classmethod
    @contextlib.contextmanager
    def open(cls, drop: Path | None, kept: Path | None) -> Iterator[CleanFiles]:
        """Open the files; they appear under their names when all rows are written.

        Args:
            drop: JSONL file of the dropped rows: source, row, why, and the row itself.
            kept: folder for the other rows, `NAME.jsonl` for each source, as they stand in the source.
        """
        with contextlib.ExitStack() as stack:
            stream = None if drop is None else stack.enter_context(_writing(drop))
            yield cls(stream, kept, stack)

    def add(self, groups: SourceRows, start: int, compared: Sequence[ComparedRow]) -> None:
        """Write a batch of rows of one source, which follow each other in it.

        Rows that are no JSON can't be written as such: they are dropped too, with what is wrong with them.

        Args:
            groups: the source's rows.
            start: the place of the first of the batch among them.
            compared: the batch.

        Raises:
            DataError: the source's rows were made of trees of messages, which are not taken apart again.
        """
        values = groups.values(start, start + len(compared))
        for row, (_, value) in zip(compared, values, strict=True):
            if row.matches or isinstance(value, RejectedRow):
                self._write_dropped(row, value)
            elif self._folder is not None:
                self._write_kept(groups.name, _rows_of_file(groups, value))

    def _write_dropped(self, row: ComparedRow, value: Any) -> None:
        self.dropped += 1
        if self._drop is None:
            return
        matches = [
            {name: part for name, part in asdict(match).items() if not name.endswith("text")}
            for match in row.matches[:_SHOWN_MATCHES]
        ]
        record = {"source": row.source, "row": row.row, "num_matches": len(row.matches), "matches": matches}
        if isinstance(value, RejectedRow):
            record |= {"unreadable": value.reason, "detail": value.detail}
        else:
            record["value"] = value
        self._drop.write(_json_line(record))

    def _write_kept(self, source: str, values: Sequence[Any]) -> None:
        assert self._folder is not None
        if source not in self._files:
            path = self._new_path(source)
            self._files[source] = path, self._stack.enter_context(_writing(path))
        path, stream = self._files[source]
        for row in values:
            stream.write(_json_line(row))
        self.kept[path] += len(values)

    def _new_path(self, source: str) -> Path:
        """Return a name for the kept rows of a source that no other source has."""
        assert self._folder is not None
        stem = kept_stem(source)
        taken = {path.stem for path, _ in self._files.values()}
        return self._folder / f"{next(name for name in _numbered(stem) if name not in taken)}.jsonl"


def _rows_of_file(groups: SourceRows, value: Any) -> Sequence[Any]:
    """Return the rows of the source's file that a row was made of: itself, or those of one prompt."""
    column_map = groups.reader.column_map
    if column_map is None or not column_map.regroups:
        return [value]
    if "group_by" in column_map.settings:
        rows: list[Any] = value["rows"]
        return rows
    raise DataError(
        f"{groups.name}: its rows are made of trees of messages, which can't be written without some of them. Fix: "
        "leave out --kept; --drop says which rows match."
    )


def kept_stem(source: str) -> str:
    """Return the name of a source's file without its suffix; of a hub data set its name and split."""
    name = Path(source).name
    suffix = next((end for end in sorted(SUPPORTED_SUFFIXES, key=len, reverse=True) if name.lower().endswith(end)), "")
    return re.sub(r"[^\w.-]+", "-", name.removesuffix(suffix)).strip("-.") or "rows"


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[IO[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as stream:
        yield stream


def _json_line(value: Any) -> str:
    return json.dumps(value, default=str) + "\n"

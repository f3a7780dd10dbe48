"""Read the groups of a run's sources again as texts: the cache of encoded rows holds token ids and hashes alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rm_scale.data.conversations import message_text
from rm_scale.data.encoded_rows import read_row
from rm_scale.data.formats import RowReader
from rm_scale.data.preference_group import Message, PreferenceGroup, Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_chunks import Chunk, ChunkedRows, open_rows
from rm_scale.data.row_readers import choose_reader
from rm_scale.data.sources import Source


@dataclass(frozen=True)
class SourceGroups:
    """The rows of one source, read as the run reads them, chunk by chunk.

    Attributes:
        name: of the source.
        rows: its rows.
        reader: turns a row into a group.
        chunks: the parts that the rows are read in.
    """

    name: str
    rows: ChunkedRows
    reader: RowReader
    chunks: Sequence[Chunk]

    def __len__(self) -> int:
        """Return the number of rows, blank lines among them."""
        return sum(chunk.num_rows for chunk in self.chunks)

    def read(self, chunk: Chunk) -> Iterator[tuple[int, PreferenceGroup | RejectedRow]]:
        """Yield the number of each row of a chunk and its group, or why it can't be read."""
        for batch in self.rows.batches(chunk):
            for row, value in batch:
                yield row, read_row(self.reader, value, row)

    def at(self, row: int) -> PreferenceGroup | RejectedRow | None:
        """Return the group of one row, or why it can't be read; `None` where there is no such row."""
        # Blank lines have numbers, too, and count in some kinds of chunks alone: a row is where it would be, or before.
        for chunk in reversed([one for one in self.chunks if one.first_row <= row]):
            is_before = False
            for number, found in self.read(chunk):
                if number == row:
                    return found
                is_before |= number < row
            if is_before:
                return None
        return None


def read_groups(source: Source, work: Path) -> SourceGroups:
    """Open a source.

    Args:
        source: what to read.
        work: a folder of its own for temporary files; it must stay until the last row is read.

    Raises:
        DataError: the source can't be read, or fits no format.
    """
    rows = open_rows(source, work)
    reader, _ = choose_reader(source, rows, rows.sample())
    return SourceGroups(source.name, rows, reader, rows.cut())


def plain_text(text: Text) -> str:
    """Return a text, or the turns of a conversation one below the other.

    The role stands before each turn, but not before an answer that is a single turn; tool calls are JSON.
    """
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] == "assistant":
        return _turn(text[0])
    return "\n\n".join(f"{message['role']}: {_turn(message)}" for message in text)


def _turn(message: Message) -> str:
    calls = message.get("tool_calls")
    return message_text(message) + (f"\n{json.dumps(calls, sort_keys=True)}" if calls else "")

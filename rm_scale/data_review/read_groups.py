"""Read the groups of a run's sources again as texts: the cache of encoded rows holds token ids and hashes alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rm_scale.data.conversations import message_text
from rm_scale.data.encoded_rows import read_row
from rm_scale.data.formats import RowReader
from rm_scale.data.preference_group import Message, PreferenceGroup, Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_readers import choose_reader, open_source
from rm_scale.data.sources import RawRows, Source

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class SourceGroups:
    """The rows of one source, read as the run reads them.

    Attributes:
        name: of the source.
        raw: its rows.
        reader: turns a row into a group.
    """

    name: str
    raw: RawRows
    reader: RowReader

    def __len__(self) -> int:
        return len(self.raw.dataset)

    def __iter__(self) -> Iterator[tuple[int, PreferenceGroup | RejectedRow]]:
        """Yield each row's number and its group, or why it can't be read."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self._read(range(start, min(start + _ROWS_AT_ONCE, len(self))))

    def at(self, row: int) -> PreferenceGroup | RejectedRow:
        """Return the group of one row, or why it can't be read."""
        ((_, found),) = self._read(range(row, row + 1))
        return found

    def _read(self, places: range) -> Iterator[tuple[int, PreferenceGroup | RejectedRow]]:
        batch = self.raw.dataset[places.start : places.stop]
        for row, value in self.raw.decode(batch, places):
            yield row, read_row(self.reader, value, row)


def read_groups(source: Source, work: Path) -> SourceGroups:
    """Open a source.

    Args:
        source: what to read.
        work: a folder of its own for temporary files; it must stay until the last row is read.

    Raises:
        DataError: the source can't be read, or fits no format.
    """
    raw = open_source(source, work)
    sample = raw.sample()
    reader, _ = choose_reader(source, raw, sample)
    return SourceGroups(source.name, raw, reader)


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

"""Read the rows of a table file by number, find what of a row is scored, and write rows to a file again."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.data.context_columns import refuse_unread_beside, refuse_unread_text
from rm_scale.data.conversations import (
    as_text,
    as_tools,
    check_answered,
    json_messages,
    read_completion,
)
from rm_scale.data.formats import without_text_prompt
from rm_scale.data.preference_group import Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import check_unicode
from rm_scale.data.sources import RawRows, local_sources
from rm_scale.errors import DataError
from rm_scale.files import replacing

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")


@dataclass(frozen=True)
class RowFile:
    """The rows of one file. Nothing of it is held in memory; JSON and CSV are laid out on disk once.

    Attributes:
        name: the path as given.
        identity: what must be unchanged for it to be the same file.
        raw: the rows.
        ignore_columns: what of a row is carried along and not read.
    """

    name: str
    identity: dict[str, Any]
    raw: RawRows
    ignore_columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.raw.dataset)

    def read(self, start: int, stop: int) -> list[tuple[int, Any]]:
        """Return number and content of some rows; a `RejectedRow` in place of one that can't be read."""
        stop = min(stop, len(self))
        rows = self.raw.decode(self.raw.dataset[start:stop], range(start, stop)) if start < stop else []
        if not self.ignore_columns:
            return rows
        return [
            (number, PartlyReadRow(row, self.ignore_columns) if isinstance(row, Mapping) else row)
            for number, row in rows
        ]


class PartlyReadRow(dict[str, Any]):
    """A row with columns that are not to be read: they come back with its score.

    Args:
        row: names and values.
        ignore_columns: those that are not read.
    """

    def __init__(self, row: Mapping[str, Any], ignore_columns: Sequence[str]) -> None:
        super().__init__(row)
        self.ignore_columns = tuple(ignore_columns)

    def read_columns(self) -> dict[str, Any]:
        """Return the columns that are read."""
        return {name: value for name, value in self.items() if name not in self.ignore_columns}

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild it in another process."""
        return type(self), (dict(self), self.ignore_columns)


@contextmanager
def open_rows(path: str, ignore_columns: Sequence[str] = ()) -> Iterator[RowFile]:
    """Open a JSONL, JSON, CSV (each also .gz), Parquet or Arrow file.

    Args:
        path: of the file.
        ignore_columns: columns that `scorable` leaves out, as training does.

    Raises:
        DataError: it is not there, or can't be read at all.
    """
    with tempfile.TemporaryDirectory(prefix="rm_scale_rows_") as work:
        (source,) = local_sources([path])
        yield RowFile(path, source.identity, source.load(Path(work)), tuple(ignore_columns))


# --- What of a row is scored -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorable:
    """What a row asks to be scored.

    Attributes:
        prompt, completion: texts or lists of messages.
        tools: tool descriptions for the chat template.
        text: a whole text, as the contract renders it; then the others are not used.
    """

    prompt: Text = ""
    completion: Text = ""
    tools: list[Any] | None = None
    text: str | None = None


FIX_IN_FILES = "make it part of prompt, or --ignore_columns {names} to score without"
_FIX_ELSEWHERE = "give one form: prompt and completion, or messages, or text; and leave {names} out"


def scorable(row: Any, cells: bool = True) -> Scorable:
    """Read `prompt` and `completion`, or `messages` (the last one is the completion), or `text`.

    `conversations` is a prompt where there is no other, as in training. What else a row holds of these, and what
    training refuses as context that is not read, must be part of what is scored.

    Args:
        row: names and values.
        cells: it comes from a table, where a completion may be a conversation written as JSON. Elsewhere a text is a
            text, and keeps a prompt that it repeats: see `rm_scale.data.conversations.read_completion`.

    Raises:
        RejectedRow: none of them is there, one is not what it should be, or the row holds several that differ.
    """
    if isinstance(row, RejectedRow):
        raise row
    if not isinstance(row, Mapping):
        raise RejectedRow("wrong_type", "the row is no object with columns")
    if isinstance(row, PartlyReadRow):
        row = row.read_columns()
    found, read = _scorable_of(row, cells)
    fix = FIX_IN_FILES if cells else _FIX_ELSEWHERE
    if found.text is not None:
        refuse_unread_beside(row, found.text, [""], read, fix)
    else:
        refuse_unread_beside(row, found.prompt, [found.completion], read, fix)
        refuse_unread_text(row, found.prompt, [found.completion], fix)
    return found


def _scorable_of(row: Mapping[str, Any], cells: bool) -> tuple[Scorable, set[str]]:
    """Return what the first form that a row has asks to be scored, and the columns that it was read from."""
    if row.get("completion") is not None:
        name = prompt_column(row)
        prompt, completion, tools = read_completion(row.get(name), row["completion"], row.get("tools"), cells)
        if cells and isinstance(prompt, str) and isinstance(completion, str):
            (completion,) = without_text_prompt(prompt, [completion])
        return Scorable(prompt, completion, tools), {name, "completion"}
    if row.get("messages") is not None:
        messages = as_text(row["messages"], "messages")
        if isinstance(messages, str):
            raise RejectedRow("wrong_type", "messages is text, not a list of messages")
        check_answered(messages)
        return Scorable(messages[:-1], messages[-1:], as_tools(row.get("tools"))), {"messages"}
    if row.get("text") is not None:
        if not isinstance(row["text"], str):
            raise RejectedRow("wrong_type", "text is not text")
        check_unicode(row["text"], "text")
        return Scorable(text=row["text"]), {"text"}
    seen = ", ".join(row) or "no column"
    raise RejectedRow("missing_key", f"prompt and completion, or messages, or text; the row has {seen}")


def prompt_column(row: Mapping[str, Any]) -> str:
    """Return the column of the prompt: `conversations` where that holds messages and there is no `prompt`."""
    value = row.get("conversations")
    if row.get("prompt") is None and value is not None:
        if isinstance(value, str):
            value = json_messages(value, "conversations")
        if isinstance(value, list):
            return "conversations"
    return "prompt"


# --- The file that comes of it ---------------------------------------------------------------------------------------


def output_suffix(path: str | Path) -> str:
    """Return which of `OUTPUT_SUFFIXES` the file is to be.

    Raises:
        DataError: none of them, or its folder is not there.
    """
    name = Path(path).name.lower()
    for suffix in OUTPUT_SUFFIXES:
        if name.endswith(suffix):
            if not Path(path).resolve().parent.is_dir():
                raise DataError(f"output {path}: there is no folder {Path(path).parent}. Fix: make it first.")
            return suffix
    raise DataError(
        f"output {path}: can't be written in this form. Fix: a name ending in {', '.join(OUTPUT_SUFFIXES)}."
    )


def write_rows(parts: Sequence[Iterable[Mapping[str, Any]]], path: str | Path) -> Path:
    """Write rows that come in parts, which can be gone through more than once; whole or not at all.

    Args:
        parts: each yields its rows anew whenever it is iterated.
        path: ends in one of `OUTPUT_SUFFIXES`. In CSV, whatever is no text or number becomes JSON.
    """
    path = Path(path)
    suffix = output_suffix(path)
    with replacing(path) as aside:
        if suffix == ".csv":
            _write_csv(parts, aside)
        elif suffix == ".parquet":
            _write_parquet(parts, aside, path.name)
        else:
            _write_jsonl(parts, aside, compress=suffix.endswith(".gz"))
    return path


def _write_jsonl(parts: Sequence[Iterable[Mapping[str, Any]]], path: Path, compress: bool) -> None:
    with contextlib.ExitStack() as stack:
        binary: Any = stack.enter_context(path.open("wb"))
        if compress:
            # No name and no time inside: the same rows are the same bytes.
            binary = stack.enter_context(gzip.GzipFile("", "wb", fileobj=binary, mtime=0))
        for part in parts:
            for row in part:
                binary.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _write_csv(parts: Sequence[Iterable[Mapping[str, Any]]], path: Path) -> None:
    names = _column_names(parts)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for part in parts:
            writer.writerows([_cell(row.get(name)) for name in names] for row in part)


def _column_names(parts: Sequence[Iterable[Mapping[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for row in part for name in row))


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def _table(part: Iterable[Mapping[str, Any]], names: Sequence[str], schema: Any = None) -> Any:
    import pyarrow as pa

    rows = list(part)
    return pa.Table.from_pydict({name: [row.get(name) for row in rows] for name in names}, schema=schema)


def _write_parquet(parts: Sequence[Iterable[Mapping[str, Any]]], path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Given by column: from rows, Arrow would take the columns of the first one alone.
    names = _column_names(parts)
    try:
        schemas = [_table(part, names).schema for part in parts]
        # A column may hold nulls only in one part and texts in another.
        schema = pa.unify_schemas(schemas, promote_options="permissive") if schemas else pa.schema([])
        with pq.ParquetWriter(path, schema) as writer:
            for part in parts:
                writer.write_table(_table(part, names, schema))
    except pa.ArrowException as error:
        raise DataError(
            f"output {name}: the rows have no common types for Parquet ({error}). Fix: an output ending in .jsonl."
        ) from error

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

from rm_scale.data.context_columns import refuse_template_arguments
from rm_scale.data.conversations import as_text, as_tools, check_answered, read_completion
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
    """

    name: str
    identity: dict[str, Any]
    raw: RawRows

    def __len__(self) -> int:
        return len(self.raw.dataset)

    def read(self, start: int, stop: int) -> list[tuple[int, Any]]:
        """Return number and content of some rows; a `RejectedRow` in place of one that can't be read."""
        stop = min(stop, len(self))
        return self.raw.decode(self.raw.dataset[start:stop], range(start, stop)) if start < stop else []


@contextmanager
def open_rows(path: str) -> Iterator[RowFile]:
    """Open a JSONL, JSON, CSV (each also .gz), Parquet or Arrow file.

    Raises:
        DataError: it is not there, or can't be read at all.
    """
    with tempfile.TemporaryDirectory(prefix="rm_scale_rows_") as work:
        (source,) = local_sources([path])
        yield RowFile(path, source.identity, source.load(Path(work)))


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


def scorable(row: Any, cells: bool = True) -> Scorable:
    """Read `prompt` and `completion`, or `messages` (the last one is the completion), or `text`.

    Args:
        row: names and values.
        cells: it comes from a table, where a completion may be a conversation written as JSON. Elsewhere a text is a
            text: see `rm_scale.data.conversations.read_completion`.

    Raises:
        RejectedRow: none of them is there, or one is not what it should be.
    """
    if isinstance(row, RejectedRow):
        raise row
    if not isinstance(row, Mapping):
        raise RejectedRow("wrong_type", "the row is no object with columns")
    if row.get("completion") is not None:
        refuse_template_arguments(row)
        return Scorable(*read_completion(row.get("prompt"), row["completion"], row.get("tools"), json_text=cells))
    if row.get("messages") is not None:
        refuse_template_arguments(row)
        messages = as_text(row["messages"], "messages")
        if isinstance(messages, str):
            raise RejectedRow("wrong_type", "messages is text, not a list of messages")
        check_answered(messages)
        return Scorable(messages[:-1], messages[-1:], as_tools(row.get("tools")))
    if row.get("text") is not None:
        if not isinstance(row["text"], str):
            raise RejectedRow("wrong_type", "text is not text")
        check_unicode(row["text"], "text")
        return Scorable(text=row["text"])
    seen = ", ".join(row) or "no column"
    raise RejectedRow("missing_key", f"prompt and completion, or messages, or text; the row has {seen}")


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

"""What a row says, as the hashes by which the groups of two evaluations are recognised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rm_scale.data.formats import RowReader
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_readers import reader_of_rows
from rm_scale.data.text_keys import text_hash, text_keys

PROMPT_COLUMNS = ("prompt", "question", "instruction", "input", "context")
# Not text_chosen and text_rejected: they hold the prompt as one model's chat template writes it.
_RESPONSE_COLUMNS = (
    ("chosen", "rejected"),
    ("response_A", "response_B"),
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("output_1", "output_2"),
    ("responses",),
    ("completions",),
)


def preference_reader(sample: Sequence[Mapping[str, Any]], source: str, ignored: Sequence[str]) -> RowReader | None:
    """Return what reads these rows as training reads them; `None` where they are no preferences in such a format.

    Args:
        sample: the first readable rows.
        source: name of the file.
        ignored: columns that are not read, the scores' own first of all.
    """
    return reader_of_rows(sample, source, ignored)


def row_keys(row: Mapping[str, Any], number: int, reader: RowReader | None) -> tuple[int | None, int | None]:
    """Return the hash of the prompt, and that of prompt and responses; `None` for what the row does not hold.

    A row that training can read has the hashes that a model's evaluation of the same row has.
    """
    if reader is not None:
        try:
            return text_keys(reader.read(row, number))
        except RejectedRow:
            pass
    prompt = next((row[name] for name in PROMPT_COLUMNS if _says_something(row.get(name))), None)
    if prompt is None:
        return None, None
    pair = next((names for names in _RESPONSE_COLUMNS if all(_says_something(row.get(name)) for name in names)), None)
    content = None if pair is None else text_hash([prompt, [row[name] for name in pair]])
    return text_hash([prompt, None]), content


def _says_something(value: Any) -> bool:
    return isinstance(value, str | list) and bool(value) and not (isinstance(value, list) and _is_number(value[0]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)

"""Read single values of a raw row (text, numbers, margin, ranks); a value of the wrong type rejects the row.

Every function raises `RejectedRow`, with the reason, for a value that can't be used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rm_scale.data.rejected_rows import RejectedRow

Row = Mapping[str, Any]


def kind_name(value: Any) -> str:
    """Return what a JSON value is, in words for messages."""
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def first_present(row: Row, names: Sequence[str]) -> str:
    """Return the first of these columns that has a value in the row."""
    for name in names:
        if row.get(name) is not None:
            return name
    raise RejectedRow("missing_key", " or ".join(names))


def text_value(row: Row, column: str) -> str:
    """Return the text of a column."""
    value = row.get(column)
    if value is None:
        raise RejectedRow("missing_key", column)
    if not isinstance(value, str):
        raise RejectedRow("wrong_type", f"{column} is {kind_name(value)}, not text")
    return value


def label_text(value: Any, column: str) -> str:
    """Return an id or subset, given as text or a number, as text; "" for none."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RejectedRow("wrong_type", f"{column} is {kind_name(value)}, not text or a number")
    # Table libraries turn a column of whole numbers into floats as soon as one row has no value.
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    check_unicode(text, column)
    return text


def number_value(value: Any, column: str) -> float:
    """Return a finite number."""
    if value is None:
        raise RejectedRow("bad_label", f"{column} holds null")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RejectedRow("wrong_type", f"{column} holds {kind_name(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RejectedRow("bad_label", f"{column}={number} is not finite")
    return number


def margin_value(row: Row) -> float | None:
    """Return the row's margin (>= 0), or `None` when it has none."""
    if row.get("margin") is None:
        return None
    margin = number_value(row["margin"], "margin")
    if margin < 0:
        raise RejectedRow("bad_label", f"margin={margin} is negative: chosen would be the worse response")
    return margin


def rank_values(row: Row, num_responses: int) -> tuple[int, ...]:
    """Return K ranks from 0 (best) without gaps, read from `ranks` (smallest is best) or `scores` (highest is best)."""
    column = first_present(row, ("ranks", "scores"))
    values = row[column]
    if not isinstance(values, list):
        raise RejectedRow("wrong_type", f"{column} is {kind_name(values)}, not a list of numbers")
    if len(values) != num_responses:
        raise RejectedRow("bad_label", f"{column} has {len(values)} values for {num_responses} responses")
    numbers = [number_value(value, column) for value in values]
    if column == "ranks" and any(number != int(number) for number in numbers):
        raise RejectedRow("bad_label", f"ranks={values} are not whole numbers (are they scores?)")
    places = sorted(set(numbers), reverse=column == "scores")
    rank_of = {number: rank for rank, number in enumerate(places)}
    return tuple(rank_of[number] for number in numbers)


def without_none(value: Any) -> Any:
    """Drop null entries at any depth: Parquet and Arrow give every struct the keys of all structs in its column."""
    if isinstance(value, Mapping):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_none(part) for part in value]
    return value


def refuse_empty_prompt(prompt: str) -> None:
    """Reject a row whose prompt is blank."""
    if not prompt.strip():
        raise RejectedRow("empty", "the prompt has no text")


def check_unicode(text: str, where: str) -> None:
    """Reject text that can't be written as UTF-8, which tokenizers can't take."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedRow("bad_unicode", f"{where} holds a lone surrogate at {error.start}") from None


def check_no_nul(value: Any, where: str) -> None:
    """Reject NUL characters in every text of a JSON value: the sign of a broken file.

    For training data alone. A policy may write one, and its text has a score.
    """
    if isinstance(value, str):
        if "\x00" in value:
            raise RejectedRow("bad_unicode", f"{where} holds a NUL character at {value.index(chr(0))}")
        return
    parts = (
        [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    )
    for part in parts:
        check_no_nul(part, where)


def check_unicode_inside(value: Any, where: str) -> None:
    """Check every text inside a JSON value, keys included."""
    if isinstance(value, str):
        check_unicode(value, where)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            check_unicode_inside(key, where)
            check_unicode_inside(part, where)
    elif isinstance(value, list):
        for part in value:
            check_unicode_inside(part, where)

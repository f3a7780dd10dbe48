"""Read the value of a place in a row: a path, a constant, a text made of several columns, a mean, a difference."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rm_scale.config_columns import TEMPLATE_FIELD
from rm_scale.data.column_maps.paths import ABSENT, look_up, value_at
from rm_scale.data.preference_group import Message
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row, kind_name, number_value

_LINE = "\n"


def read_place(row: Row, place: Any) -> Any:
    """Return the value of a place, as `rm_scale.config_columns.map_problems` admits them.

    Raises:
        RejectedRow: the row does not have it, or holds something there of which it can't be made.
    """
    if isinstance(place, str):
        return value_at(row, place)
    if "path" in place:
        return value_at(row, place["path"])
    if "constant" in place:
        return place["constant"]
    if "first_of" in place:
        return _first_of(row, place["first_of"])
    if "template" in place:
        return _filled(row, place["template"])
    if "join" in place:
        return _joined(row, place["join"], place.get("with", _LINE))
    if "dialogue" in place:
        return _turns(value_at(row, place["dialogue"]), place)
    if "mean" in place:
        return _mean(read_places(row, place["mean"]), str(place["mean"]))
    first, second = read_numbers(row, place["difference"])
    return first - second


def read_places(row: Row, places: Any) -> Any:
    """Return the values of a list of places, or the value of one that holds a list."""
    return [read_place(row, place) for place in places] if isinstance(places, list) else read_place(row, places)


def read_numbers(row: Row, places: Any) -> list[float]:
    """Return the numbers of a list of places, or of one that holds a list of them.

    Raises:
        RejectedRow: `wrong_type` or `bad_label` for anything but finite numbers.
    """
    values = read_places(row, places)
    if not isinstance(values, list):
        raise RejectedRow("wrong_type", f"{places} is {kind_name(values)}, not a list of numbers")
    return [number_value(as_number(value), str(places)) for value in values]


def as_number(value: Any) -> Any:
    """Return a number that is written as text, as in CSV, as a number; anything else as it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def is_blank(value: Any) -> bool:
    """Tell whether a value says nothing: null, no text, or the NaN that table libraries write for a missing one."""
    return value is None or value is ABSENT or (isinstance(value, str) and not value.strip()) or value != value


def _first_of(row: Row, places: Sequence[Any]) -> Any:
    for place in places:
        try:
            value = read_place(row, place)
        except RejectedRow as rejected:
            if rejected.reason != "missing_key":
                raise
            continue
        if not is_blank(value):
            return value
    raise RejectedRow("missing_key", " or ".join(str(place) for place in places))


def _filled(row: Row, template: str) -> str:
    return TEMPLATE_FIELD.sub(lambda found: _field(row, found), template)


def _field(row: Row, found: re.Match[str]) -> str:
    if found.group(1) is None:
        return found.group()[0]
    path = found.group(1)
    value = value_at(row, path)
    if value is None and path.endswith("?"):
        return ""
    if is_blank(value) and not isinstance(value, str):
        raise RejectedRow("missing_key", path)
    return _as_text(value, path)


def _joined(row: Row, places: Sequence[Any], between: str) -> str | None:
    parts = []
    for place in places:
        value = look_up(row, place.removesuffix("?")) if isinstance(place, str) else read_place(row, place)
        if not is_blank(value):
            parts.append(_as_text(value, str(place)))
    if not parts:
        raise RejectedRow("missing_key", " or ".join(str(place) for place in places))
    return between.join(parts)


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return _LINE.join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RejectedRow("wrong_type", f"{where} is {kind_name(value)}, not text")
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _turns(text: Any, place: Mapping[str, Any]) -> list[Message]:
    """Return a text with a mark before each turn as messages; what stands before the first mark is a turn as well."""
    if not isinstance(text, str):
        raise RejectedRow("wrong_type", f"{place['dialogue']} is {kind_name(text)}, not text")
    marks = place["marks"]
    # The longest first: one mark may begin like another.
    parts = re.split("(" + "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) + ")", text)
    turns = [(place.get("first", "user"), parts[0])]
    turns += [(marks[mark], said) for mark, said in zip(parts[1::2], parts[2::2], strict=True)]
    found = [{"role": role, "content": said.strip()} for role, said in turns]
    if not found[0]["content"]:
        found = found[1:]
    # A prompt that ends with the mark of the answer to come.
    if found and found[-1]["role"] == "assistant" and not found[-1]["content"]:
        found = found[:-1]
    if not found:
        raise RejectedRow("empty", f"{place['dialogue']} has no turn")
    return found


def _mean(values: Any, where: str) -> Any:
    """Return the mean of numbers, or of each list of numbers in a list."""
    if not isinstance(values, list) or not values:
        raise RejectedRow("bad_label", f"{where} is {kind_name(values)}, not a list of ratings")
    if all(isinstance(value, list) for value in values):
        return [_mean(value, where) for value in values]
    numbers = [number_value(as_number(value), where) for value in values if value is not None]
    if not numbers:
        raise RejectedRow("bad_label", f"{where} has no rating")
    return math.fsum(numbers) / len(numbers)

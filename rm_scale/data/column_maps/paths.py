"""Find a value inside a row by its path: `meta.question`, `answers[0].text`, `answers[*].text` for a list of them."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row, kind_name

_STEP = re.compile(r"\[(-?\d+|\*)\]|([^.\[\]]+)")
_EACH = "*"
Step = int | str
ABSENT = object()
"""What stands at a path that a row does not have."""


@functools.lru_cache(maxsize=1 << 12)
def _steps(path: str) -> tuple[tuple[bool, Step], ...]:
    """Return the steps of a path, each with whether it is one into a list."""
    return tuple(
        (bool(place), (place if place == _EACH else int(place)) if place else name)
        for place, name in _STEP.findall(path)
    )


def value_at(row: Row, path: str) -> Any:
    """Return the value at a path; `None` where the row holds null there, or lacks it and the path ends in "?".

    Raises:
        RejectedRow: `missing_key`, there is no such place in the row; `wrong_type`, `[*]` or `[0]` stands at no list.
    """
    found = look_up(row, path.removesuffix("?"))
    if found is not ABSENT:
        return found
    if path.endswith("?"):
        return None
    raise RejectedRow("missing_key", path)


def look_up(row: Row, path: str) -> Any:
    """Return the value at a path, or `ABSENT`.

    Raises:
        RejectedRow: `wrong_type`, `[*]` or `[0]` stands at no list.
    """
    if path in row:  # a column may have dots in its name
        return row[path]
    return _walk(row, _steps(path), path)


def _walk(value: Any, steps: tuple[tuple[bool, Step], ...], path: str) -> Any:
    for number, (in_list, step) in enumerate(steps):
        value = _parsed(value)
        if in_list and value is not None and not isinstance(value, list):
            raise RejectedRow("wrong_type", f"{path}: [{step}] stands at {kind_name(value)}, not a list")
        if in_list and step == _EACH:
            return _each(value, steps[number + 1 :], path)
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return ABSENT
    return value


def _each(value: list[Any] | None, rest: tuple[tuple[bool, Step], ...], path: str) -> Any:
    if value is None:
        return None
    found = [_walk(part, rest, path) for part in value]
    return ABSENT if ABSENT in found else found


def _parsed(value: Any) -> Any:
    """Return a list or object that a column holds as JSON text, as tables often do."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value

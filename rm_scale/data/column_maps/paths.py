"""Find a value inside a row by its path: `meta.question`, `answers[0].text`."""

from __future__ import annotations

import re
from typing import Any

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row

_STEP = re.compile(r"\[(-?\d+)\]|([^.\[\]]+)")


def value_at(row: Row, path: str) -> Any:
    """Return the value at a path; `None` where the row holds null there.

    Raises:
        RejectedRow: `missing_key`, there is no such place in the row.
    """
    if path in row:
        return row[path]
    value: Any = row
    for number, name in _STEP.findall(path):
        try:
            value = value[int(number)] if number else value[name]
        except (KeyError, IndexError, TypeError):
            raise RejectedRow("missing_key", path) from None
    return value

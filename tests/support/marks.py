"""Which cases of a matrix `make test` runs, and which wait for `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_long(values: Iterable[Any], short: Iterable[Any]) -> list[Any]:
    """Return the values as parameters, all of them marked `long` except `short`."""
    kept = list(short)
    return [value if value in kept else pytest.param(*_parts(value), marks=pytest.mark.long) for value in values]


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)

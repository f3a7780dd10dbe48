"""Read JSON whose values may be of any type: records that were cut short or edited, contracts, models' configs.

Standard library only. Accessors return the value where it is what was asked for, and else nothing, so that a record
with a wrong value shows less and breaks nothing. A `Rule` is for files that must be right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 100
"""Lists and objects inside each other; Python gives up at about a thousand, in whatever reads the values next."""
_LARGEST = 2**53
"""Above this a float does not know each whole number."""


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, holds a number of thousands of digits, or is nested more than `MAX_DEPTH` deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        held = [one for one in level if isinstance(one, list | dict)]
        level = [part for one in held for part in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return False
    return any(isinstance(one, list | dict) for one in level)


# --- One value -------------------------------------------------------------------------------------------------------


def as_number(value: Any) -> float | None:
    """Return a finite number as a float; none for anything else, such as not-a-number or 10 to the power of 400."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_whole(value: Any) -> int | None:
    """Return a whole number that a float can hold exactly; none for anything else."""
    number = as_number(value)
    return int(number) if number is not None and number == int(number) and abs(number) <= _LARGEST else None


def as_text(value: Any) -> str | None:
    """Return a text; none for anything else."""
    return value if isinstance(value, str) else None


def as_list(value: Any) -> list[Any]:
    """Return a list; an empty one for anything else."""
    return value if isinstance(value, list) else []


def as_mapping(value: Any) -> dict[str, Any]:
    """Return an object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


# --- Rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        is_met: tells whether a value is so; it never raises.
        words: the same for people, behind "must be".
    """

    is_met: Callable[[Any], bool]
    words: str

    def or_null(self) -> Rule:
        """Return the rule that takes null as well."""
        return Rule(lambda value: value is None or self.is_met(value), f"{self.words}, or null")


TEXT = Rule(lambda value: isinstance(value, str), "a text")
NAME = Rule(lambda value: isinstance(value, str) and bool(value.strip()) and "\0" not in value, "a name")
TRUE_OR_FALSE = Rule(lambda value: isinstance(value, bool), "true or false")
NUMBER = Rule(lambda value: as_number(value) is not None, "a finite number")
OBJECT = Rule(lambda value: isinstance(value, dict), "an object")


def whole(least: int, most: int) -> Rule:
    """Return the rule of whole numbers within both ends."""
    return Rule(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
        f"a whole number from {least:,} to {most:,}",
    )


def one_of(*known: str) -> Rule:
    """Return the rule of a text that is one of these."""
    words = repr(known[0]) if len(known) == 1 else f"one of {', '.join(map(repr, known))}"
    return Rule(lambda value: isinstance(value, str) and value in known, words)


def broken_rule(values: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = "") -> str | None:
    """Return "name=value: must be ..." of the first value that breaks its rule; a missing one breaks none.

    Args:
        values: to be judged; those without a rule are not.
        rules: by the value's name.
        prefix: stands before the name.
    """
    for name, rule in rules.items():
        if name in values and not rule.is_met(values[name]):
            return f"{prefix}{name}={shown(values[name])}: must be {rule.words}"
    return None


def shown(value: Any) -> str:
    """Return a value of JSON as a message shows it: as in the file, and not too long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."

"""Where a row's scores lie, and what is a score: a finite number, also as text or as the one element of a list."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_scale.errors import DataError
from rm_scale.json_values import parse_json
from rm_scale.texts import did_you_mean, one_line, some_names

SCORE_REASONS = {
    "missing_score": "a score is absent, null or empty",
    "nan_score": "a score is not a number (NaN)",
    "infinite_score": "a score is infinite, or larger than float32 holds",
    "bad_score": "a score is text, an object or a truth value",
    "ragged_scores": "there are not as many scores as labels, or only one",
    "single_response": "a group of a long file has one response only, so nothing can be compared",
}
"""Why a row's scores can't be used, beside `rm_scale.data.rejected_rows.REJECTION_REASONS`."""

_LARGEST = 3.0e38
"""Rewards are compared in float64, but losses are computed in float32."""
# The names under which published files hold scores, in the order of search; two names are chosen and rejected.
_KNOWN = (
    *((f"{word}_chosen", f"{word}_rejected") for word in ("scores", "score", "rewards", "reward")),
    *((f"chosen_{word}", f"rejected_{word}") for word in ("scores", "score", "rewards", "reward")),
    ("judgments.0.judgment.scores",),
    ("score_*",),
    ("rewards",),
    ("scores",),
    ("reward",),
    ("score",),
)


class UnusableScores(Exception):
    """A row or group whose scores can't be used.

    Args:
        reason: a key of `SCORE_REASONS` or of `REJECTION_REASONS`.
        detail: what exactly was seen.
        num_pairs: how many comparisons are lost with it, as far as that is known.
    """

    def __init__(self, reason: str, detail: str, num_pairs: int = 1) -> None:
        self.reason = reason
        self.detail = detail
        self.num_pairs = num_pairs
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class ScoreColumns:
    """One set of scores.

    Attributes:
        columns: one name, of a list per row or of a number per row; or several, of which the first is chosen unless
            labels say otherwise. A dotted name leads into a value: `judgments.0.judgment.scores`.
    """

    columns: tuple[str, ...]

    @property
    def text(self) -> str:
        """The columns as one text, as the user may write them."""
        return self.columns[0] if len(self.columns) == 1 else ",".join(self.columns)

    @property
    def says_chosen(self) -> bool:
        """True when the names themselves say which response is the better one."""
        return len(self.columns) == 2 and "chosen" in self.columns[0].lower() and "rejected" in self.columns[1].lower()

    @property
    def roots(self) -> tuple[str, ...]:
        """The row's own columns that these lie in."""
        return tuple(dict.fromkeys(name if "." not in name else name.partition(".")[0] for name in self.columns))

    def parts(self, row: Mapping[str, Any]) -> list[list[float | UnusableScores]]:
        """Return the scores of each column; those that can't be used say why.

        Raises:
            UnusableScores: a column is absent or empty, so that not even their number is known.
        """
        return [_numbers(find(row, name), name) for name in self.columns]


def find(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, or of the place inside one that a dotted name leads to; `None` if there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for word in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(word)
        elif isinstance(value, list) and word.isdigit() and int(word) < len(value):
            value = value[int(word)]
        else:
            return None
    return value


# --- Which columns ---------------------------------------------------------------------------------------------------


def score_columns(words: Sequence[str], sample: Sequence[Mapping[str, Any]], name: str) -> list[ScoreColumns]:
    """Return the sets of scores that are asked for, in order.

    Args:
        words: `column` (a list or a number per row), `chosen,rejected`, or `score_*` (numbered columns). `chosen` alone
            finds its `rejected`, and the two one behind the other are one set. None: the names of published files.
        sample: the first readable rows.
        name: of the file, for messages.

    Raises:
        DataError: a column is not there, or none has a known name.
    """
    if not words:
        found = next((known for known in _KNOWN if all(_expand(part, sample) for part in known)), None)
        if found is None:
            raise DataError(
                f"--score_column: {name} has no column of scores with a known name; it has "
                f"{some_names(_columns(sample)) or 'no columns'}. Fix: --score_column NAME, of a list per row, or "
                "CHOSEN,REJECTED."
            )
        return [ScoreColumns(tuple(column for part in found for column in _expand(part, sample)))]
    sets: list[ScoreColumns] = []
    for word in words:
        names = [word] if _expand(word, sample) else [part.strip() for part in word.split(",") if part.strip()]
        columns = [column for part in names or [word] for column in _expanded(part, sample, name)]
        partner = _partner(columns[0]) if len(columns) == 1 else None
        if sets and partner is not None and sets[-1].columns == (partner, columns[0]):
            continue  # chosen and rejected as two words: the first has found the second
        if partner is not None and "chosen" in columns[0].lower() and _expand(partner, sample):
            columns.append(partner)
        sets.append(ScoreColumns(tuple(columns)))
    return sets


def _expanded(word: str, sample: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    columns = _expand(word, sample)
    if not columns:
        hint = did_you_mean(word, _columns(sample), f"it has {some_names(_columns(sample))}")
        raise DataError(f"--score_column {one_line(word, 80)!r}: {name} has no such column. Fix: {hint}.")
    return columns


def _expand(word: str, sample: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that a word names: itself, or the numbered ones of `score_*` in the order of their numbers."""
    word = re.sub(r"\[(\d+)\]", r".\1", word)
    if "*" not in word:
        return [word] if any(find(row, word) is not None or word in row for row in sample) else []
    pattern = re.compile(re.escape(word).replace(r"\*", r"(\d+)") + "$")
    numbered = [(int(found[1]), column) for column in _columns(sample) if (found := pattern.match(column))]
    return [column for _, column in sorted(numbered)]


def _columns(sample: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(name) for row in sample for name in row))


def _partner(name: str) -> str | None:
    """Return the other one of a chosen and a rejected column."""
    for one, other in (("chosen", "rejected"), ("rejected", "chosen"), ("Chosen", "Rejected"), ("Rejected", "Chosen")):
        if one in name:
            return name.replace(one, other)
    return None


# --- Numbers ---------------------------------------------------------------------------------------------------------


def _numbers(value: Any, column: str) -> list[float | UnusableScores]:
    if isinstance(value, str) and value.strip()[:1] == "[":
        value = _parsed(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) and len(value[0]) > 1:
        value = value[0]  # one list of scores in a list of one
    if value is None or value in ("", []):
        raise UnusableScores("missing_score", f"{column} is {'absent or null' if value is None else 'empty'}")
    return [_number(part, column) for part in (value if isinstance(value, list) else [value])]


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def _number(value: Any, column: str) -> float | UnusableScores:
    """Return a score, or why it is none; text that is a number counts, as CSV has nothing else."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, str) and not value.strip()):
        return UnusableScores("missing_score", f"{column} holds {'null' if value is None else 'an empty text'}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return UnusableScores("bad_score", f"{column} holds {one_line(repr(value), 60)}")
    try:
        number = float(value)
    except ValueError:
        return UnusableScores("bad_score", f"{column} holds {one_line(repr(value), 60)}")
    except OverflowError:
        number = math.inf
    if math.isnan(number):
        return UnusableScores("nan_score", f"{column} holds NaN")
    if abs(number) > _LARGEST:
        return UnusableScores("infinite_score", f"{column} holds {number:g}")
    return number


def first_problem(values: Iterable[float | UnusableScores]) -> UnusableScores | None:
    """Return the first score that can't be used."""
    return next((value for value in values if isinstance(value, UnusableScores)), None)

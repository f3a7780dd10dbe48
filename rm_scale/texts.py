"""Pieces of messages for people: errors in one line, "did you mean ...?", lengths of time."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path


def one_line(value: object, limit: int | None = None) -> str:
    """Return a text, or an error's, in one line: any run of spaces and line breaks is one space.

    Args:
        value: the text, or whatever `str` makes one of.
        limit: characters to keep; "..." follows where there were more.
    """
    text = " ".join(str(value).split())
    return text if limit is None or len(text) <= limit else f"{text[:limit]}..."


# Everything that moves a terminal's cursor or changes its state, C1 among it; marks that turn the direction of writing;
# line separators that editors and terminals disagree about; halves of UTF-16 pairs, which can't be printed at all.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text that may come from data, safe for a terminal or a model card: no character of it does anything.

    Line feeds and tabs stay. Control characters, escape sequences among them, and marks that turn the direction of
    writing are shown by their numbers, as Python does.
    """
    return _UNPRINTABLE.sub(_as_escape, text)


def _as_escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def has_surrogates(text: str) -> bool:
    """Tell whether a text can't be written as UTF-8: it holds half of a UTF-16 pair, or a byte that was not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; its type's name when it has none."""
    return str(error).strip().partition("\n")[0].rstrip() or type(error).__name__


def typed_line(error: BaseException, limit: int | None = None) -> str:
    """Return "Type: text" in one line, for errors whose text alone may say too little; see `one_line`."""
    return f"{type(error).__name__}: {one_line(error, limit)}".removesuffix(": ")


_NUMBER = re.compile(r"\d+")


def did_you_mean(
    name: str, known: Iterable[str], otherwise: str, most: int = 1, likeness: float = 0.6, same_number: bool = False
) -> str:
    """Return "did you mean NAME?" with the known names that look like this one.

    Args:
        name: what was given.
        known: what could have been.
        otherwise: returned when no name is near.
        most: how many names to offer.
        likeness: from 0 to 1; `difflib`'s ratio that a name must reach.
        same_number: offer only names that begin with the same number, where the name has one: a 4090 is no 5090.
    """
    number = _NUMBER.search(name) if same_number else None
    alike = [one for one in known if number is None or ((n := _NUMBER.search(one)) and n[0] == number[0])]
    close = difflib.get_close_matches(name, alike, n=most, cutoff=likeness)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that this one was most likely meant to be; `None` where none is really near.

    Near is a name at most two edits away, of long ones, or one edit, of short ones (under six characters); else one
    with the same stem: its words begin or end the other's, or begin alike one by one.

    Args:
        name: what was written, of words with "_" between them.
        known: the names to choose from.
    """
    names = list(known)
    by_edits = [(_edits(name.replace("_", ""), one.replace("_", "")), one) for one in names]
    edits, best = min(by_edits, default=(3, ""))
    if edits <= (2 if len(name) >= 6 else 1):
        return best
    stems = [one for one in names if _shares_stem(name.split("_"), one.split("_"))]
    return max(stems, key=lambda one: difflib.SequenceMatcher(None, name, one).ratio(), default=None)


def _edits(one: str, other: str) -> int:
    """Return how many letters must be put in, left out, replaced or swapped with the next to turn one into the other.

    It is the "optimal string alignment" distance: of swapped letters none is changed a second time.
    """
    before: list[int] = []
    last = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        current = [row]
        for column, wanted in enumerate(other, 1):
            cost = min(last[column] + 1, current[-1] + 1, last[column - 1] + (letter != wanted))
            if row > 1 and column > 1 and letter == other[column - 2] and one[row - 2] == wanted:
                cost = min(cost, before[column - 2] + 1)
            current.append(cost)
        before, last = last, current
    return last[-1]


def _shares_stem(one: list[str], other: list[str]) -> bool:
    short, long = sorted((one, other), key=len)
    if len(short) < 2:
        return False
    if len(short) == len(long):
        return all(a.startswith(b) or b.startswith(a) for a, b in zip(short, long, strict=True))
    return long[: len(short)] == short or long[-len(short) :] == short


def some_names(names: Iterable[str], most: int = 20) -> str:
    """Return names with commas between, shortened where they are long, and how many more there are."""
    listed = list(names)
    shown = ", ".join(one_line(name, 80) for name in listed[:most])
    return shown if len(listed) <= most else f"{shown} and {len(listed) - most:,} more"


def range_rule(option: str, value: float | None, least: float, most: float = math.inf) -> str | None:
    """Return why a number can't be an option's value, with the fix; `None` when it can, or when there is none.

    Args:
        option: its name, such as "--seed".
        value: the number. NaN lies in no range.
        least: the smallest that is allowed.
        most: the largest.
    """
    if value is None or least <= value <= most:
        return None
    if value > most:
        return f"must be at most {most}. Fix: {option} {most} or less."
    return f"must be at least {least}. Fix: {option} {least} or more."


_SUFFIXES_OF_DATA = (".json", ".jsonl", ".gz", ".csv", ".parquet", ".arrow")


def nearest_file(path: Path) -> str:
    """Return why there is no such file of data, as far as names tell: no such folder, or a name there is like it.

    Returns:
        " The folder ... does not exist either.", " Did you mean ...?", or nothing.
    """
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.name.lower().endswith(_SUFFIXES_OF_DATA))
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def large_number(value: float) -> str:
    """Return a count as people say it: 81k, 134.5M, 13.02B; below a thousand as it is."""
    for unit, name, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 0)):
        if value >= unit:
            return f"{value / unit:,.{digits}f}{name}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return a length of time as people say it: 45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"

"""What an examination of the data found: how often, where to look, and which setting follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["problem", "note", "nothing"]
"""problem: act on it; note: know it; nothing: looked for, and not found."""

NUM_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 400


@dataclass(frozen=True)
class Example:
    """Rows to look at.

    Attributes:
        source: file or hub name.
        rows: their numbers in the source, from 0.
        texts: what they say, by name and cut, or what is wrong with them.
    """

    source: str
    rows: tuple[int, ...]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Suggestion:
    """What to do.

    Attributes:
        text: in words.
        settings: the settings or the command that does it, ready to paste; "" where the data itself must be corrected.
    """

    text: str
    settings: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: for programs.
        title: for people.
        level: how much it matters.
        count: how often it was seen, `out_of` how many that could have had it.
        unit: what is counted: pairs, groups, rows, prompts.
        sampled: counted in the sample alone rather than in all rows.
        meaning: what it is, and why it matters.
        examples: up to `NUM_EXAMPLES`.
        suggestion: `None` where there is nothing to do.
    """

    name: str
    title: str
    level: Level
    count: int
    out_of: int
    unit: str
    sampled: bool
    meaning: str
    examples: tuple[Example, ...] = ()
    suggestion: Suggestion | None = None

    @property
    def share(self) -> float | None:
        """`count` of `out_of`; `None` when nothing could have had it."""
        return self.count / self.out_of if self.out_of else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "share": self.share}


def cut(text: str, limit: int = _EXAMPLE_CHARACTERS) -> str:
    """Return the start of a text, and how many characters more it has."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} characters more)"


def cut_left(text: str, limit: int = _EXAMPLE_CHARACTERS) -> str:
    """Return the end of a text, which of a prompt says more than its start, and how many characters stand before."""
    return text if len(text) <= limit else f"({len(text) - limit:,} characters before) …{text[-limit:]}"

"""`evaluation_scores.jsonl`: every group's rewards, one JSON object per line, written and read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rm_scale.errors import DataError
from rm_scale.json_values import as_number, parse_json
from rm_scale.training.pair_counts import ScoredGroup

_FIRST_LINE = 1 << 20
_FIX = "Fix: give an evaluation_scores.jsonl that training or rm-scale eval wrote."


def hash_text(key: int) -> str:
    """Return a 64-bit hash as text: JSON's numbers are not exact that far."""
    return f"{int(key) & 0xFFFF_FFFF_FFFF_FFFF:016x}"


def score_lines(groups: Iterable[ScoredGroup]) -> str:
    """Return one JSON object per line and group: all that an evaluation needs; what is unknown is left out."""
    return "".join(json.dumps(_as_row(group), ensure_ascii=False) + "\n" for group in groups)


def _as_row(group: ScoredGroup) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": group.id,
        "subset": group.subset,
        "ranks": list(group.ranks),
        "rewards": list(group.rewards),
    }
    further = {
        "lengths": list(group.lengths),
        "margin": group.margin,
        "soft_label": group.soft_label,
        "source": group.source,
        "prompt": group.prompt,
        "content": group.content,
    }
    return row | {name: value for name, value in further.items() if value not in (None, "", [])}


def is_scores_file(path: Path) -> bool:
    """Tell whether the first line of a file is a group as `score_lines` writes it."""
    try:
        with path.open(encoding="utf-8") as stream:
            row = parse_json(stream.readline(_FIRST_LINE))
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and isinstance(row.get("ranks"), list) and isinstance(row.get("rewards"), list)


def read_scores(path: Path) -> list[ScoredGroup]:
    """Read groups and rewards from a file that `score_lines` made.

    Raises:
        DataError: the file can't be read, is empty, or a line is not such a group.
    """
    try:
        # Not splitlines(): a text in a group may hold U+2028, at which it would cut the line.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}). {_FIX}") from error
    groups = [_group(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not groups:
        raise DataError(f"{path}: holds no group. Fix: give an evaluation_scores.jsonl with at least one line.")
    return groups


def _group(path: Path, number: int, line: str) -> ScoredGroup:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise _bad_line(path, number, f"is not JSON ({error})") from None
    problem = "; ".join(_row_problems(row)) if isinstance(row, dict) else "is not an object"
    if problem:
        raise _bad_line(path, number, problem)
    texts = {name: row.get(name) or "" for name in ("id", "subset", "source", "prompt", "content")}
    return ScoredGroup(
        rewards=[float(value) for value in row["rewards"]],
        ranks=row["ranks"],
        margin=row.get("margin"),
        soft_label=row.get("soft_label"),
        lengths=row.get("lengths") or [],
        **{name: str(value) for name, value in texts.items()},
    )


def _row_problems(row: Mapping[str, Any]) -> Iterator[str]:
    ranks, rewards = row.get("ranks"), row.get("rewards")
    if not _are_numbers(ranks) or not all(isinstance(rank, int) for rank in ranks or []):
        yield "ranks must be a list of whole numbers"
    elif not _are_numbers(rewards):
        yield "rewards must be a list of numbers"
    elif len(ranks or []) != len(rewards or []) or len(ranks or []) < 2:
        yield f"has {len(ranks or [])} ranks and {len(rewards or [])} rewards, and needs as many of both, at least 2"
    elif row.get("lengths") and (not _are_numbers(row["lengths"]) or len(row["lengths"]) != len(ranks or [])):
        yield "lengths must be as many numbers as ranks"
    for name in ("margin", "soft_label"):
        value = row.get(name)
        if value is not None and not _are_numbers([value]):
            yield f"{name} must be a number"
    soft = row.get("soft_label")
    if _are_numbers([soft]) and (not 0 <= float(soft or 0) <= 1 or len(ranks or []) != 2):
        yield "soft_label must be between 0 and 1, for two responses"


def _are_numbers(values: Any) -> bool:
    """Tell whether this is a list of numbers that floats can hold; NaN is refused later, with the model's name."""
    return isinstance(values, list) and all(
        isinstance(value, float) or (isinstance(value, int) and as_number(value) is not None) for value in values
    )


def _bad_line(path: Path, number: int, problem: str) -> DataError:
    return DataError(f"{path}, line {number}: {problem}. {_FIX}")

"""Turn a ranked group into chosen/rejected pairs, and count the comparisons that make none."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

from rm_scale.data.conversations import message_text
from rm_scale.data.formats import MAX_RESPONSES
from rm_scale.inference.ranking.rank_candidates import RankedGroup
from rm_scale.inference.ranking.selection import Selected, Selection


def preference_pairs(ranked: RankedGroup, how: Selection) -> Selected:
    """Return the group's pairs as rows, and the comparisons that gave none by reason."""
    if len(ranked.order) == 1:
        return Selected([], "one_completion")
    distinct = _distinct_positions(ranked)
    if len(distinct) == 1:
        return Selected([], "identical_completions")
    if ranked.ranks[-1] == 0:
        return Selected([], "equal_scores")
    no_pairs = Counter(reason for position in distinct if (reason := _unfit(ranked, position)) is not None)
    filled = [position for position in distinct if _unfit(ranked, position) is None]
    if how.pairs == "all" and len(filled) > MAX_RESPONSES:
        return Selected([], "too_many_completions", no_pairs)
    choice = _choose_pairs(ranked, filled, how)
    if choice is None:
        return Selected([], "tied", no_pairs)
    rows = []
    for better, worse in choice:
        margin = ranked.score(ranked.order[better]) - ranked.score(ranked.order[worse])
        if margin <= 0:
            no_pairs["tie"] += 1
        elif margin < how.min_margin:
            no_pairs["below_min_margin"] += 1
        else:
            rows.append(_pair_row(ranked, better, worse, margin, how))
    return Selected(rows, None if rows else "no_pair", no_pairs)


def _distinct_positions(ranked: RankedGroup) -> list[int]:
    """Return the positions of the ranking without repeated texts: the same text twice would be the same pair twice."""
    seen: set[str] = set()
    positions = []
    for position in range(len(ranked.order)):
        key = ranked.text_at(position)
        if key not in seen:
            seen.add(key)
            positions.append(position)
    return positions


def _unfit(ranked: RankedGroup, position: int) -> str | None:
    """Say why a completion can't be part of a pair that preference formats read; `None` when it can."""
    completion = ranked.group.completions[ranked.order[position]]
    assert completion is not None
    if _has_nul(completion):
        return "nul_character"
    if isinstance(completion, str):
        return None if completion.strip() else "empty_completion"
    last = completion[-1] if completion else {}
    return None if message_text(last).strip() or last.get("tool_calls") else "empty_completion"


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\x00" in value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(_has_nul(part) for part in parts)


def _choose_pairs(ranked: RankedGroup, positions: list[int], how: Selection) -> list[tuple[int, int]] | None:
    """Return which positions are compared, the better one first; `None` when the prompt is to be skipped for a tie."""
    if len(positions) < 2:
        return []
    if how.pairs == "all":
        return list(combinations(positions, 2))
    if how.pairs == "adjacent":
        return list(pairwise(positions))
    ranks = [ranked.ranks[position] for position in positions]
    chance = how.random_for(ranked.group)
    best = _one_of([p for p in positions if ranked.ranks[p] == ranks[0]], how, chance)
    below = [p for p in positions if ranked.ranks[p] > ranks[0]]
    if not below:
        return [(positions[0], positions[1])]  # a tie, and counted as one
    if how.pairs == "best_random":
        worse: int | None = chance.choice(below)
    else:
        worse = _one_of([p for p in below if ranked.ranks[p] == ranks[-1]], how, chance)
    return None if best is None or worse is None else [(best, worse)]


def _one_of(tied: Sequence[int], how: Selection, chance: random.Random) -> int | None:
    if len(tied) == 1 or how.ties == "first":
        return tied[0]
    return None if how.ties == "skip" else chance.choice(tied)


def _pair_row(ranked: RankedGroup, better: int, worse: int, margin: float, how: Selection) -> dict[str, Any]:
    group = ranked.group
    chosen, rejected = ranked.order[better], ranked.order[worse]
    row = ranked.shared_columns()
    row["chosen"] = group.completions[chosen]
    row["rejected"] = group.completions[rejected]
    row["score_chosen"] = ranked.score(chosen)
    row["score_rejected"] = ranked.score(rejected)
    row[how.margin_column] = margin
    for name, values in group.per_completion.items():
        row[f"{name}_chosen"], row[f"{name}_rejected"] = values[chosen], values[rejected]
    return row

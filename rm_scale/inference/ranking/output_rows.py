"""Turn a ranked group into output rows: all completions in order, the first k, the best one, or pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rm_scale.inference.ranking.preference_pairs import preference_pairs
from rm_scale.inference.ranking.rank_candidates import RankedGroup
from rm_scale.inference.ranking.selection import Selected, Selection


def select(ranked: RankedGroup, how: Selection) -> Selected:
    """Return the output rows of one group, or why there are none."""
    if not ranked.order:
        return Selected([], "no_scored_completion")
    match how.output_format:
        case "ranked":
            return Selected([_listing(ranked, range(len(ranked.order)))])
        case "top":
            return _top(ranked, how)
        case "best":
            return _best(ranked, how)
        case "pairs":
            return preference_pairs(ranked, how)


def _listing(ranked: RankedGroup, positions: Iterable[int]) -> dict[str, Any]:
    """Return the completions at these positions of the ranking as one row.

    `prompt`, `completions` and `ranks` are what the `ranked` data format reads.
    """
    positions = list(positions)
    places = [ranked.order[position] for position in positions]
    row = ranked.shared_columns()
    row["completions"] = [ranked.group.completions[place] for place in places]
    row["scores"] = [ranked.score(place) for place in places]
    row["ranks"] = [ranked.ranks[position] for position in positions]
    row["order"] = places
    row["num_completions"] = len(ranked.group.completions)
    for name, values in ranked.group.per_completion.items():
        row[name] = [values[place] for place in places]
    return row


def _top(ranked: RankedGroup, how: Selection) -> Selected:
    positions = _order_ties(ranked, how)
    count = min(how.top_k, len(positions))
    cut_in_tie = count < len(positions) and ranked.ranks[count - 1] == ranked.ranks[count]
    if how.ties == "skip" and cut_in_tie and _differ(ranked, positions, ranked.ranks[count]):
        return Selected([], "tied")
    return Selected([_listing(ranked, positions[:count])])


def _best(ranked: RankedGroup, how: Selection) -> Selected:
    positions = _order_ties(ranked, how)
    if how.ties == "skip" and _differ(ranked, positions, 0):
        return Selected([], "tied")
    place = ranked.order[positions[0]]
    if how.min_score is not None and ranked.score(place) < how.min_score:
        return Selected([], "below_min_score")
    row = ranked.shared_columns()
    row["completion"] = ranked.group.completions[place]
    row["score"] = ranked.score(place)
    row["place"] = place
    row["num_completions"] = len(ranked.group.completions)
    row |= {name: values[place] for name, values in ranked.group.per_completion.items()}
    return Selected([row])


def _order_ties(ranked: RankedGroup, how: Selection) -> list[int]:
    """Return the positions of the ranking, best first, with ties in the order that `how` asks for."""
    positions = list(range(len(ranked.order)))
    if how.ties == "random":
        how.random_for(ranked.group).shuffle(positions)
        positions.sort(key=lambda position: ranked.ranks[position])
    return positions


def _differ(ranked: RankedGroup, positions: Sequence[int], rank: int) -> bool:
    """Tell whether different completions share this rank; the same text several times is no choice."""
    texts = {ranked.text_at(position) for position in positions if ranked.ranks[position] == rank}
    return len(texts) > 1
